"""Image files, and which of them cannot be read."""

from collections.abc import Sequence

import torch
from PIL import Image

from utils.errors import DataError


class Images:
    """Reads images by number, and knows which of them could not be read, also when workers did the reading.

    Args:
        paths: one per number.
        skip_bad: `read` gives None for an image that cannot be read, instead of raising.
    """

    def __init__(self, paths: Sequence[str], *, skip_bad: bool) -> None:
        self.paths, self.skip_bad = paths, skip_bad
        # Shared memory: workers do the reading.
        self.bad = torch.zeros(len(paths), dtype=torch.bool).share_memory_()

    def read(self, number: int) -> Image.Image | None:
        try:
            return read_image(self.paths[number])
        except DataError:
            if not self.skip_bad:
                raise
            self.bad[number] = True
            return None

    def unreadable(self) -> list[str]:
        """The paths that could not be read until now."""
        return sorted({self.paths[number] for number in self.bad.nonzero().flatten().tolist()})


def read_image(path: str) -> Image.Image:
    """The image as RGB.

    Raises:
        DataError: it is missing, truncated or no image; the message names the path.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise DataError(f"{path}: no such image") from None
    except Exception as error:  # PIL's decoders raise errors of many types on damaged files
        raise DataError(f"{path}: this image cannot be read ({error})") from None
