"""Image transforms. Augmentations are registered functions whose keyword-only arguments YAML may set."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms as T

from configs.schema import DataConfig
from utils.batch import Batch
from utils.config import named_options
from utils.options import Option
from utils.pixels import MEAN_FILL, Box, prepared, raw_image
from utils.registry import Registry

RESIZE = {"bilinear": T.InterpolationMode.BILINEAR, "bicubic": T.InterpolationMode.BICUBIC}
Fraction = Annotated[float, Option(ge=0, le=1)]
Fractions = Annotated[tuple[float, float], Option(ge=0, le=1, ascending=True)]
Ratios = Annotated[tuple[float, float], Option(gt=0, ascending=True)]


class Steps(NamedTuple):
    """Transforms of one augmentation."""

    image: Sequence[Callable[[Image.Image], Image.Image]] = ()  # on PIL images of the final size
    tensor: Sequence[Callable[[Tensor], Tensor]] = ()  # on normalised tensors (3, H, W), after erasing; slow
    erase: Sequence[Callable[[tuple[int, int]], Box]] = ()  # image size -> rectangle, erased on the model's device


@dataclass(frozen=True)
class Erasing:
    """Random draw of a rectangle, as torchvision's RandomErasing draws it."""

    probability: float
    area: tuple[float, float]
    ratio: tuple[float, float]
    noise: bool

    def __call__(self, size: tuple[int, int]) -> Box:
        """The rectangle in an image of a size (height, width); an empty one if none is drawn, or none fits."""
        if torch.rand(1) >= self.probability:
            return NOTHING
        image = torch.empty(1).expand(3, *size)
        top, left, height, width, fill = T.RandomErasing.get_params(image, list(self.area), list(self.ratio), [0.0])
        if fill is image:  # no rectangle of the drawn areas and ratios fits
            return NOTHING
        return Box(top, left, height, width, int(torch.randint(2**62, ())) if self.noise else MEAN_FILL)


NOTHING = Box(0, 0, 0, 0)
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
    return Steps(erase=[Erasing(probability, area, ratio, noise=False)])


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
    return Steps(erase=[Erasing(probability, area, ratio, noise=True)])


def augmentation_options(image_aug: Sequence[Any]) -> list[dict[str, dict[str, Any]]]:
    """A config's `data.image_aug` with every option spelt out and checked; raises `ConfigError`."""
    return [{name: options} for name, options in named_options(image_aug, AUGMENTATIONS, "data.image_aug")]


class ImageTransform:
    """Transform of a PIL image to a normalised float32 (3, H, W) of exactly `image_size`.

    Args:
        config: data settings.
        train: augment, and resize by `train_resize` instead of bilinearly.

    Raises:
        ConfigError: unknown augmentation or option.
    """

    def __init__(self, config: DataConfig, *, train: bool) -> None:
        chosen = dict(named_options(config.image_aug if train else [], AUGMENTATIONS, "data.image_aug"))
        steps = [AUGMENTATIONS.get(name, "")(config, **chosen[name]) for name in AUGMENTATIONS if name in chosen]
        self.size, self.stats = config.image_size, torch.tensor([[config.image_mean, config.image_std]])
        self.resize = T.Resize(config.image_size, RESIZE[config.train_resize if train else "bilinear"])
        self.image = [step for augmentation in steps for step in augmentation.image]
        self.erase = [step for augmentation in steps for step in augmentation.erase]
        self.tensor = [step for augmentation in steps for step in augmentation.tensor]

    @property
    def depth(self) -> int:
        """Bytes of a pixel's colour in raw images."""
        return 4 if self.tensor else 1

    def __call__(self, image: Image.Image) -> Tensor:
        return prepared(self.raw(image), torch.device("cpu"))[""][0]

    def raw(self, image: Image.Image) -> Batch:
        """The image as fields for `utils.pixels.prepared`; only steps on tensors are done here, after the erasing."""
        image = self.resize(image)
        for change in self.image:
            image = change(image)
        pixels = torch.from_numpy(np.stack([np.asarray(band) for band in image.split()]))  # faster than a transpose
        raw = raw_image(pixels, self.stats, [draw(self.size) for draw in self.erase])
        if not self.tensor:
            return raw
        tensor = prepared(raw, torch.device("cpu"))[""][0]
        for step in self.tensor:
            tensor = step(tensor)
        return {"": tensor[None]}


def build_transform(config: DataConfig, *, train: bool) -> ImageTransform:
    """The transform of a config's images; arguments and errors as `ImageTransform`."""
    return ImageTransform(config, train=train)
