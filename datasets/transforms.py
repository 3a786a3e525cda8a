"""Image transforms by name, in the order of the recipe (IRRA datasets/build.py:build_transforms)."""

from collections.abc import Callable, Iterable

from PIL import Image
from torch import Tensor
from torchvision import transforms as T

from utils.errors import ConfigError
from utils.registry import did_you_mean

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

ImageTransform = Callable[[Image.Image], Tensor]


def build_transform(image_size: tuple[int, int], image_aug: Iterable[str] = ()) -> ImageTransform:
    """PIL image -> float32 (3, H, W), resized to exactly `image_size`, augmented, CLIP-normalised.

    Args:
        image_size: height and width in pixels.
        image_aug: any of `flip`, `pad_crop`, `erase`; they are always applied in this order, whatever the list's.

    Raises:
        ConfigError: an augmentation that does not exist.
    """
    before: dict[str, list[Callable]] = {
        "flip": [T.RandomHorizontalFlip(0.5)],
        "pad_crop": [T.Pad(10), T.RandomCrop(image_size)],
    }
    # The fill is the mean colour although the image is normalised by then: so does the published recipe (quirk Q17).
    after = {"erase": [T.RandomErasing(0.5, scale=(0.02, 0.4), ratio=(0.3, 3.3), value=CLIP_MEAN)]}
    chosen = list(image_aug)
    for name in chosen:
        if name not in before | after:
            raise ConfigError(f"data.image_aug: unknown '{name}'; {did_you_mean(name, [*before, *after])}")
    steps: list[Callable] = [T.Resize(image_size)]
    steps += [step for name, part in before.items() if name in chosen for step in part]
    steps += [T.ToTensor(), T.Normalize(CLIP_MEAN, CLIP_STD)]
    steps += [step for name, part in after.items() if name in chosen for step in part]
    return T.Compose(steps)
