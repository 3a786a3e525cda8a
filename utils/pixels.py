"""Images between a data loading worker and the model: 8-bit pixels, and how they are normalised and erased.

Pixels are a quarter of the bytes of normalised images. The device of the model does the arithmetic.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

STATS, ERASE = "/stats", "/erase"  # fields of raw images, behind the name of their field
MEAN_FILL = -1  # seed of a box with the fill colour


class Box(NamedTuple):
    """Rectangle of an image to erase."""

    top: int
    left: int
    height: int
    width: int
    seed: int = MEAN_FILL  # of normal noise


def raw_image(pixels: Tensor, stats: Tensor, boxes: Sequence[Box]) -> dict[str, Tensor]:
    """Fields of one image, by what follows the name of its field.

    Args:
        pixels: uint8 (3, H, W).
        stats: RGB mean, which is also the fill colour of normalised images, and deviation: float32 (1, 2, 3).
        boxes: rectangles to erase, in order; an empty one has height 0.
    """
    erase = torch.tensor(boxes, dtype=torch.int64).view(1, len(boxes), len(Box._fields))
    return {"": pixels[None], STATS: stats, ERASE: erase}


def prepared(fields: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The fields on `device`, raw images normalised and erased; copies from pinned memory do not block."""
    moved = {name: value.to(device, non_blocking=True) for name, value in fields.items() if not name.endswith(ERASE)}
    for name in [name for name in fields if name + STATS in fields]:
        stats = moved.pop(name + STATS)
        moved[name] = erased(normalised(moved[name], stats), stats[:, 0], fields[name + ERASE])
    return moved


def normalised(pixels: Tensor, stats: Tensor) -> Tensor:
    """Pixels uint8 (R, 3, H, W) with their mean and deviation (R, 2, 3) -> float32 (R, 3, H, W).

    The steps are those of torchvision's ToTensor and Normalize, to the last bit.
    """
    images = pixels.to(torch.float32).div_(255)
    mean, std = stats[..., None, None].unbind(1)
    return images.sub_(mean).div_(std)


def erased(images: Tensor, colours: Tensor, boxes: Tensor) -> Tensor:
    """Fill boxes of normalised images, in place.

    Args:
        images: float32 (R, 3, H, W).
        colours: fill colours (R, 3).
        boxes: int64 (R, E, 5), on the CPU, so that no step waits for the device.
    """
    for image, colour, row in zip(images, colours, boxes.tolist(), strict=True):
        for top, left, height, width, seed in row:
            if height:
                area = image[:, top : top + height, left : left + width]
                if seed == MEAN_FILL:
                    area.copy_(colour[:, None, None].expand_as(area))
                else:
                    area.normal_(generator=torch.Generator(images.device).manual_seed(seed))
    return images
