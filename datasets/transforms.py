"""Image transforms by name, in the order of the recipe (IRRA datasets/build.py:build_transforms)."""

from collections.abc import Callable

from PIL import Image
from torch import Tensor
from torchvision import transforms as T

from configs.schema import DataConfig
from utils.errors import ConfigError
from utils.registry import did_you_mean

RESIZE = {"bilinear": T.InterpolationMode.BILINEAR, "bicubic": T.InterpolationMode.BICUBIC}
ImageTransform = Callable[[Image.Image], Tensor]


def build_transform(config: DataConfig, *, train: bool) -> ImageTransform:
    """PIL image -> float32 (3, H, W), resized to exactly `image_size`, augmented where it is for training, normalised.

    Args:
        config: its `image_size` (height, width), `image_mean`, `image_std`, `train_resize`; its `image_aug` are any of
            `flip`, `pad_crop`, `erase` and `erase_noise`, and are always applied in this order, whatever the list's.
        train: whether to augment.

    Raises:
        ConfigError: an augmentation that does not exist.
    """
    before: dict[str, list[Callable]] = {
        "flip": [T.RandomHorizontalFlip(0.5)],
        "pad_crop": [T.Pad(10), T.RandomCrop(config.image_size)],
    }
    # The fill is the mean colour although the image is normalised by then: so does the published recipe (quirk Q17).
    after = {
        "erase": [T.RandomErasing(0.5, scale=(0.02, 0.4), ratio=(0.3, 3.3), value=config.image_mean)],
        # As timm's with mode "pixel" (IVT spec 3.3): normal noise for each pixel.
        "erase_noise": [T.RandomErasing(0.5, scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3), value="random")],
    }
    chosen = config.image_aug if train else []
    for name in chosen:
        if name not in before | after:
            raise ConfigError(f"data.image_aug: unknown '{name}'; {did_you_mean(name, [*before, *after])}")
    steps: list[Callable] = [T.Resize(config.image_size, RESIZE[config.train_resize if train else "bilinear"])]
    steps += [step for name, part in before.items() if name in chosen for step in part]
    steps += [T.ToTensor(), T.Normalize(config.image_mean, config.image_std)]
    steps += [step for name, part in after.items() if name in chosen for step in part]
    return T.Compose(steps)
