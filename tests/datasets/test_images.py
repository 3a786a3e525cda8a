"""Image files: any mode becomes RGB, unreadable files are named."""

from pathlib import Path

import pytest
from PIL import Image

from datasets.images import read_image
from utils.errors import DataError


def test_images_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nobody\.jpg: no such image"):
        read_image(str(tmp_path / "nobody.jpg"))
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(DataError, match=r"text\.jpg: unreadable image"):
        read_image(str(tmp_path / "text.jpg"))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
def test_any_image_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    name = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.new(mode, (9, 5)).save(name)
    assert read_image(str(name)).mode == "RGB"
