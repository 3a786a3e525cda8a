"""Reading of image files as upright 8-bit RGB, with a record of the unreadable ones."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import ExifTags, Image, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, PHOTOMETRIC_INTERPRETATION, TiffImageFile

from utils.errors import DataError, first_line
from utils.faults import HANDLES
from utils.paths import in_full, why_not_a_file

MISSING = "no such image"
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "JPEG2000", "PPM", "TIFF", "WEBP")  # no EPS: Pillow would run Ghostscript on it
FORMATS_OF_16_BITS = ("PNG", "PPM")  # their mode I holds 0..65535 (PNG: in Pillow before version 11)
TURNS = {  # EXIF orientation -> the operation that turns the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Header(NamedTuple):
    """Properties of an image that are known before its pixels are decoded."""

    mode: str  # Pillow's name
    transparent: bool
    orientation: int  # EXIF orientation, 1 (upright) to 8


class Cache(Protocol):
    """Decoded images by path."""

    def get(self, path: str) -> Image.Image | None: ...


class Images:
    """Reads images by number and records the unreadable ones, across data loading workers.

    Args:
        paths: path of each image.
        skip_bad: return None for an unreadable image instead of raising.
        cache: decoded images.
    """

    def __init__(self, paths: Sequence[str], *, skip_bad: bool, cache: Cache | None = None) -> None:
        self.paths, self.skip_bad, self.cache = paths, skip_bad, cache
        # Shared memory: the workers write to it.
        self.bad = torch.zeros(len(paths), dtype=torch.bool)
        self.bad.share_memory_()

    def read(self, number: int) -> Image.Image | None:
        """The image, decoded; of the training size if it comes from the cache."""
        if self.cache is not None and (image := self.cache.get(self.paths[number])) is not None:
            return image
        try:
            return read_image(self.paths[number])
        except DataError:
            if not self.skip_bad:
                raise
            self.bad[number] = True
            return None

    def unreadable(self) -> list[str]:
        """Paths that could not be read so far."""
        return sorted({self.paths[number] for number in self.bad.nonzero().flatten().tolist()})


def read_image(path: str) -> Image.Image:
    """Read an image as 8-bit RGB, upright. docs/data.md says what becomes of each kind of image.

    Raises:
        DataError: the file is missing, a pipe or a device, truncated, no image, or of unknown brightness range.
    """
    with _opened(path) as image:
        image.load()  # Pillow turns TIFF images upright here, and drops their orientation
        rgb = _as_rgb(image)
        turn = TURNS.get(_orientation(image))
        return rgb if turn is None else rgb.transpose(turn)


def read_header(path: str) -> Header:
    """Read the header of an image; raises `DataError` as `read_image` does, except for damaged pixels."""
    with _opened(path) as image:
        return Header(image.mode, image.has_transparency_data, _orientation(image))


@contextlib.contextmanager
def _opened(path: str) -> Iterator[Image.Image]:
    """Open an image that has a known brightness range; errors of the body become a `DataError` with the path."""
    if kind := why_not_a_file(path):
        raise DataError(f"{in_full(path)}: must be an image file, got {kind}")
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.mode == "F" or (image.mode == "I" and image.format not in FORMATS_OF_16_BITS):
                raise ValueError(f"mode {image.mode} has no known brightness range; save it with 8 or 16 bits")
            yield image
    except FileNotFoundError:
        raise DataError(f"{in_full(path)}: {MISSING}") from None
    except UnidentifiedImageError:
        raise DataError(
            f"{in_full(path)}: unreadable image (no {', '.join(FORMATS[:-1])} or {FORMATS[-1]} by its content)"
        ) from None
    except Exception as error:  # PIL's decoders raise errors of many types on damaged files
        if isinstance(error, OSError) and error.errno in HANDLES:  # the file may be fine
            raise
        raise DataError(f"{in_full(path)}: unreadable image ({first_line(error)})") from None


def _orientation(image: Image.Image) -> int:
    try:
        orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation)  # PNG's method would decode the pixels
        return orientation if orientation in TURNS else 1
    except Exception:  # errors of many types; the pixels are readable without EXIF
        return 1


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _scaled(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    white = Image.new("RGB", image.size, "white")
    white.paste(rgba, mask=rgba)
    return white


def _scaled(image: Image.Image) -> Image.Image:
    """Keep the high byte of 16-bit grey, as Pillow does with 16-bit colour."""
    values = np.asarray(image)
    bits, inverted = 16, False
    if isinstance(image, TiffImageFile):  # may have 12 bits, or 0 for white, which Pillow leaves as they are
        bits, inverted = image.tag_v2[BITSPERSAMPLE][0], image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0
    grey = (values >> (bits - 8)).astype(np.uint8)
    grey = 255 - grey if inverted else grey
    grey[values == image.info.get("transparency", -1)] = 255
    return Image.fromarray(grey).convert("RGB")
