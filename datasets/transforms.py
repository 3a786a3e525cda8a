"""Image transforms. Augmentations are registered functions whose keyword-only arguments YAML may set."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, NamedTuple

from PIL import Image
from torch import Tensor
from torchvision import transforms as T

from configs.schema import DataConfig
from utils.config import named_options
from utils.options import Option
from utils.registry import Registry

RESIZE = {"bilinear": T.InterpolationMode.BILINEAR, "bicubic": T.InterpolationMode.BICUBIC}
ImageTransform = Callable[[Image.Image], Tensor]
Fraction = Annotated[float, Option(ge=0, le=1)]
Fractions = Annotated[tuple[float, float], Option(ge=0, le=1, ascending=True)]
Ratios = Annotated[tuple[float, float], Option(gt=0, ascending=True)]


class Steps(NamedTuple):
    """Transforms of one augmentation."""

    image: Sequence[Callable[[Image.Image], Image.Image]] = ()  # on PIL images of the final size
    tensor: Sequence[Callable[[Tensor], Tensor]] = ()  # on normalised tensors (3, H, W)


Augmentation = Callable[..., Steps]  # (config, *, options) -> its transforms
# Applied in order of registration, whatever the order in the config, as in anosorae/IRRA@cfc2378:datasets/build.py.
AUGMENTATIONS: Registry[Augmentation] = Registry("augmentation", "datasets")


@AUGMENTATIONS.register("flip")
def flip(config: DataConfig, *, probability: Fraction = 0.5) -> Steps:
    """Horizontal flip.

    Args:
        probability: fraction of flipped images.
    """
    return Steps(image=[T.RandomHorizontalFlip(probability)])


@AUGMENTATIONS.register("pad_crop")
def pad_crop(config: DataConfig, *, pad: Annotated[int, Option(ge=0)] = 10) -> Steps:
    """Zero padding, then a random crop of the original size.

    Args:
        pad: pixels added on each side.
    """
    return Steps(image=[T.Pad(pad), T.RandomCrop(config.image_size)])


@AUGMENTATIONS.register("erase")
def erase(
    config: DataConfig,
    *,
    probability: Fraction = 0.5,
    area: Fractions = (0.02, 0.4),
    ratio: Ratios = (0.3, 3.3),
) -> Steps:
    """Random erasing with the mean colour.

    The image is normalised by then, so the fill is not its mean. The published recipe does the same
    (docs/methods/irra.md#augmentation).

    Args:
        probability: fraction of the images with an erased rectangle.
        area: smallest and largest area of the rectangle, as fractions of the image.
        ratio: smallest and largest aspect ratio of the rectangle.
    """
    return Steps(tensor=[T.RandomErasing(probability, scale=area, ratio=ratio, value=config.image_mean)])


@AUGMENTATIONS.register("erase_noise")
def erase_noise(
    config: DataConfig,
    *,
    probability: Fraction = 0.5,
    area: Fractions = (0.02, 1 / 3),
    ratio: Ratios = (0.3, 1 / 0.3),
) -> Steps:
    """Random erasing with normal noise per pixel, like timm's mode "pixel" (docs/methods/ivt.md#image-augmentation).

    Args:
        probability: fraction of the images with an erased rectangle.
        area: smallest and largest area of the rectangle, as fractions of the image.
        ratio: smallest and largest aspect ratio of the rectangle.
    """
    return Steps(tensor=[T.RandomErasing(probability, scale=area, ratio=ratio, value="random")])


def augmentation_options(image_aug: Sequence[Any]) -> list[dict[str, dict[str, Any]]]:
    """A config's `data.image_aug` with every option spelt out and checked; raises `ConfigError`."""
    return [{name: options} for name, options in named_options(image_aug, AUGMENTATIONS, "data.image_aug")]


def build_transform(config: DataConfig, *, train: bool) -> ImageTransform:
    """Transform of a PIL image to a normalised float32 (3, H, W) of exactly `image_size`.

    Args:
        config: data settings.
        train: augment, and resize by `train_resize` instead of bilinearly.

    Raises:
        ConfigError: unknown augmentation or option.
    """
    chosen = dict(named_options(config.image_aug if train else [], AUGMENTATIONS, "data.image_aug"))
    augmentations = [AUGMENTATIONS.get(name, "")(config, **chosen[name]) for name in AUGMENTATIONS if name in chosen]
    transform: ImageTransform = T.Compose(
        [
            T.Resize(config.image_size, RESIZE[config.train_resize if train else "bilinear"]),
            *(transform for steps in augmentations for transform in steps.image),
            T.ToTensor(),
            T.Normalize(config.image_mean, config.image_std),
            *(transform for steps in augmentations for transform in steps.tensor),
        ]
    )
    return transform
