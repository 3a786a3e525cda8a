"""Image files: any kind becomes upright 8-bit RGB, or is refused by name."""

import errno
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import EpsImagePlugin, ExifTags, Image

from datasets.images import TURNS, Images, read_header, read_image
from utils.errors import DataError

GREY = np.linspace(0, 255, 8 * 5).astype(np.uint8).reshape(8, 5)
RGB = np.random.default_rng(0).integers(0, 256, (8, 5, 3), np.uint8)


def read(path: Path) -> np.ndarray:
    image = read_image(str(path))
    assert image.mode == "RGB"
    return np.asarray(image)


def as_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


def test_images_that_cannot_be_read_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"nobody\.jpg: no such image"):
        read_image(str(tmp_path / "nobody.jpg"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=rf"^nobody\.jpg \(relative to the working directory {tmp_path}\): no such"):
        read_image("nobody.jpg")
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(DataError, match=r"text\.jpg.*: unreadable image"):
        read_image("text.jpg")


@pytest.mark.parametrize("name", ["null\0byte.jpg", "\ud800.jpg", "a" * 300])
def test_names_that_no_file_can_have_are_no_traceback(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        read_image(str(tmp_path / name))


def test_a_pipe_a_device_and_a_folder_are_refused_unread(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")  # would block for ever
    for path, kind in ((tmp_path / "pipe.jpg", "a named pipe"), ("/dev/zero", "a device"), (tmp_path, "a folder")):
        with pytest.raises(DataError, match=f"{path}: must be an image file, got {kind}"):
            read_image(str(path))


@pytest.mark.parametrize("kind", ["EPS", "PSD", "TGA", "PDF", "ICO"])
def test_a_format_outside_the_list_is_refused_under_any_name(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")  # Pillow hands EPS to Ghostscript
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # found on an earlier call
    path = tmp_path / "x.jpg"
    if kind == "PSD":
        path.write_bytes(b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 8, 5, 8, 3) + bytes(200))
    else:
        Image.fromarray(RGB).save(path, format=kind)
    for read_any in (read_image, read_header):
        with pytest.raises(DataError, match=r"x\.jpg: unreadable image \(no JPEG, PNG, .* or WEBP by its content\)"):
            read_any(str(path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "GIF", "JPEG2000", "PPM", "TIFF", "WEBP", "MPO"])
def test_a_format_of_the_list_is_read_under_any_name(kind: str, tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "x.dat", format=kind)
    assert read(tmp_path / "x.dat").shape == RGB.shape


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "1", "CMYK", "YCbCr"])
def test_any_image_mode_becomes_what_pillow_makes_of_it(mode: str, tmp_path: Path) -> None:
    image = Image.fromarray(RGB).convert(mode)
    image.save(path := tmp_path / ("x.tif" if mode in ("CMYK", "YCbCr") else "x.png"))
    assert np.array_equal(read(path), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("name", ["x.png", "x.tif", "x.jp2", "big_endian.tif", "white_is_zero.tif", "x.pgm"])
def test_16_bit_grey_looks_like_8_bit_grey(name: str, tmp_path: Path) -> None:
    path, values = tmp_path / name, GREY * np.uint16(257)
    if name == "x.pgm":
        path.write_bytes(b"P5 5 8 65535\n" + values.astype(">u2").tobytes())
    elif name == "big_endian.tif":
        Image.fromarray(values.astype(">u2")).save(path)
    elif name == "white_is_zero.tif":
        Image.fromarray(65535 - values).save(path, tiffinfo={262: 0})
    else:
        Image.fromarray(values).save(path)
    assert np.array_equal(read(path), as_rgb(GREY))


@pytest.mark.parametrize("mode", ["F", "I"])
def test_an_unknown_brightness_range_is_refused_with_mode_and_path(mode: str, tmp_path: Path) -> None:
    Image.fromarray(GREY).convert(mode).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match=rf"x\.tif: .*mode {mode} has no known brightness range; save it with 8 or 16"):
        read_image(str(tmp_path / "x.tif"))


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    alpha = np.full((8, 5, 1), 255, np.uint8)
    alpha[0], alpha[1] = 0, 51
    Image.fromarray(np.concatenate([RGB, alpha], axis=2)).save(tmp_path / "rgba.png")
    found = read(tmp_path / "rgba.png")
    assert (found[0] == 255).all() and np.array_equal(found[2:], RGB[2:])
    assert np.abs(found[1] - (0.2 * RGB[1] + 0.8 * 255)).max() <= 1
    palette = Image.fromarray(GREY).convert("P")
    palette.save(tmp_path / "palette.png", transparency=int(np.asarray(palette)[0, 0]))
    Image.fromarray(GREY).save(tmp_path / "grey.png", transparency=0)
    Image.fromarray(GREY * np.uint16(257)).save(tmp_path / "grey16.png", transparency=0)
    Image.fromarray(as_rgb(GREY)).save(tmp_path / "rgb.png", transparency=(0, 0, 0))
    for name in ("palette", "grey", "grey16", "rgb"):
        assert np.array_equal(read(tmp_path / f"{name}.png"), as_rgb(np.where(GREY == 0, 255, GREY).astype(np.uint8)))


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, kind: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stored = Image.fromarray(np.kron(RGB, np.ones((8, 8, 1), np.uint8)))
    stored.save(path := tmp_path / f"x.{kind}", exif=exif, **({"lossless": True} if kind == "webp" else {}))
    with Image.open(path) as image:
        decoded = stored if kind == "tif" else image.convert("RGB")
    turn = TURNS.get(orientation)
    assert np.array_equal(read(path), np.asarray(decoded if turn is None else decoded.transpose(turn)))


def test_upright_means_as_viewers_show_it(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # a camera on its side: the first row of the file is the right edge
    Image.fromarray(RGB).rotate(90, expand=True).save(tmp_path / "x.png", exif=exif)
    assert np.array_equal(read(tmp_path / "x.png"), RGB)


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0 nonsense"])
def test_malformed_exif_leaves_the_image_as_it_is(exif: bytes, tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "x.webp", lossless=True, exif=exif)
    assert np.array_equal(read(tmp_path / "x.webp"), RGB)


def test_too_few_file_handles_are_no_fault_of_the_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*arguments: object, **options: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Image, "open", refuses)
    images = Images([str(tmp_path / "a.jpg")], skip_bad=True)
    with pytest.raises(OSError, match="Too many open files"):
        images.read(0)
    assert images.unreadable() == []
