"""Reading of image files, with a record of the unreadable ones."""

from collections.abc import Sequence

import torch
from PIL import Image

from utils.errors import DataError


class Images:
    """Reads images by number and records the unreadable ones, across data loading workers.

    Args:
        paths: path of each image.
        skip_bad: return None for an unreadable image instead of raising.
    """

    def __init__(self, paths: Sequence[str], *, skip_bad: bool) -> None:
        self.paths, self.skip_bad = paths, skip_bad
        # Shared memory: the workers write to it.
        self.bad = torch.zeros(len(paths), dtype=torch.bool)
        self.bad.share_memory_()

    def read(self, number: int) -> Image.Image | None:
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
    """Read an image as RGB.

    Raises:
        DataError: the file is missing, truncated or no image.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{path}: no such image") from None
    except Exception as error:  # PIL's decoders raise errors of many types on damaged files
        raise DataError(f"{path}: unreadable image ({error})") from None
