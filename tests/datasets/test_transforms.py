"""Image transforms: resizing, normalisation, and each augmentation of the recipes."""

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as T

from configs.schema import CLIP_MEAN, CLIP_STD, DataConfig
from datasets.transforms import AUGMENTATIONS, Erasing, Steps, augmentation_options, build_transform
from utils.batch import to_device
from utils.errors import ConfigError


def test_the_plain_transform_resizes_exactly_and_normalises() -> None:
    image = Image.fromarray(np.full((50, 70, 3), 128, np.uint8))
    tensor = build_transform(DataConfig(), train=False)(image)
    assert tensor.shape == (3, 384, 128)
    for channel in range(3):
        expected = (128 / 255 - CLIP_MEAN[channel]) / CLIP_STD[channel]
        torch.testing.assert_close(tensor[channel], torch.full((384, 128), expected))


def test_images_are_normalised_as_the_config_says() -> None:
    config = DataConfig(image_mean=(0.5, 0.4, 0.3), image_std=(0.5, 0.25, 0.1))
    tensor = build_transform(config, train=False)(Image.new("RGB", (4, 4), (255, 0, 51)))
    torch.testing.assert_close(tensor[:, 0, 0], torch.tensor([1.0, -1.6, -1.0]))


def test_the_augmentations_are_the_recipes() -> None:
    transform = build_transform(DataConfig(image_aug=["erase", "flip", "pad_crop"]), train=True)
    assert [type(step).__name__ for step in transform.image] == ["RandomHorizontalFlip", "Pad", "RandomCrop"]
    assert transform.erase == [Erasing(0.5, (0.02, 0.4), (0.3, 3.3), noise=False)]
    assert (transform.image[1].padding, transform.image[1].fill) == (10, 0)  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match=r"data\.image_aug: unknown augmentation 'flop'; did you mean 'flip'"):
        build_transform(DataConfig(image_aug=["flop"]), train=True)


def test_training_images_may_be_resized_bicubically_and_others_never() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 10, 3), dtype=np.uint8))
    bilinear, bicubic = (DataConfig(image_size=(64, 32), train_resize=name) for name in ("bilinear", "bicubic"))  # type: ignore[arg-type]
    plain = build_transform(bilinear, train=True)(image)
    assert torch.equal(build_transform(bicubic, train=False)(image), plain)
    expected = torch.from_numpy(np.asarray(image.resize((32, 64), Image.Resampling.BICUBIC)) / 255).permute(2, 0, 1)
    mean, std = (torch.tensor(value)[:, None, None] for value in (bicubic.image_mean, bicubic.image_std))
    torch.testing.assert_close(build_transform(bicubic, train=True)(image), ((expected - mean) / std).float())


def test_images_equal_torchvisions_recipe_to_the_last_bit() -> None:
    """Pixels that are normalised and erased in a batch are those that ToTensor, Normalize and RandomErasing make."""
    config = DataConfig(image_size=(64, 32), image_aug=["flip", "pad_crop", "erase"])
    recipe = T.Compose(
        [
            *(T.Resize(config.image_size), T.RandomHorizontalFlip(0.5), T.Pad(10), T.RandomCrop(config.image_size)),
            *(T.ToTensor(), T.Normalize(CLIP_MEAN, CLIP_STD)),
            T.RandomErasing(scale=(0.02, 0.4), value=CLIP_MEAN),
        ]
    )
    images = [
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (50, 20, 3), dtype=np.uint8)) for seed in range(40)
    ]
    transform = build_transform(config, train=True)
    torch.manual_seed(3)
    expected = torch.stack([recipe(image) for image in images])
    torch.manual_seed(3)
    rows = [transform.raw(image) for image in images]
    batch = {f"images{name}": torch.cat([row[name] for row in rows]) for name in rows[0]}
    assert batch["images"].dtype == torch.uint8
    assert torch.equal(to_device(batch, torch.device("cpu"))["images"], expected)


def test_erased_pixels_are_noise_each() -> None:
    transform = build_transform(DataConfig(image_size=(64, 32), image_aug=["erase_noise"]), train=True)
    plain = build_transform(DataConfig(image_size=(64, 32)), train=False)
    image = Image.new("RGB", (32, 64), (90, 20, 200))
    torch.manual_seed(0)
    areas = [float((transform(image) != plain(image)).any(dim=0).float().mean()) for _ in range(300)]
    erased = [area for area in areas if area]
    assert len(erased) == pytest.approx(150, abs=30)
    assert min(erased) > 0.015 and max(erased) < 0.36 and np.mean(erased) == pytest.approx((0.02 + 1 / 3) / 2, abs=0.03)
    torch.manual_seed(1)
    while not (changed := ((result := transform(image)) != plain(image)).any(dim=0)).float().mean() > 0.2:
        pass
    assert float(result[:, changed].std()) == pytest.approx(1, abs=0.1)
    assert float(result[:, changed].mean()) == pytest.approx(0, abs=0.1)


def test_augmentations_take_options_and_keep_their_order() -> None:
    augmentations = [{"erase": {"area": [0.1, 0.2], "probability": 1}}, {"pad_crop": {"pad": 3}}, "flip"]
    transform = build_transform(DataConfig(image_aug=augmentations), train=True)
    assert [type(step).__name__ for step in transform.image] == ["RandomHorizontalFlip", "Pad", "RandomCrop"]
    assert transform.image[1].padding == 3  # type: ignore[attr-defined]
    assert transform.erase == [Erasing(1, (0.1, 0.2), (0.3, 3.3), noise=False)]
    assert augmentation_options(augmentations)[1:] == [{"pad_crop": {"pad": 3}}, {"flip": {"probability": 0.5}}]


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"pad_crop": {"padding": 3}}, r"data\.image_aug\.pad_crop\.padding: unknown key; did you mean 'pad'"),
        ({"pad_crop": {"pad": -3}}, r"data\.image_aug\.pad_crop\.pad: must be at least 0, got -3"),
        ({"flip": {"probability": 1.5}}, r"data\.image_aug\.flip\.probability: must be from 0 to 1, got 1\.5"),
        ({"erase": {"area": [0.1, 2]}}, r"data\.image_aug\.erase\.area: must be from 0 to 1, got 2\.0"),
        ({"erase": {"ratio": 2}}, r"data\.image_aug\.erase\.ratio: "),
        ({"flip": None}, r"data\.image_aug\.flip: options must be a mapping, got None"),
    ],
)
def test_mistakes_in_augmentations_name_their_path(entry: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        augmentation_options([entry])


def test_an_augmentation_from_outside_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def shift(config: DataConfig, *, by: float = 1.0) -> Steps:
        return Steps(tensor=[lambda tensor: tensor + by])

    monkeypatch.setitem(AUGMENTATIONS._components, "shift", shift)
    image = Image.new("RGB", (4, 4), (255, 0, 51))
    plain = build_transform(DataConfig(image_size=(8, 4)), train=True)(image)
    shifted = build_transform(DataConfig(image_size=(8, 4), image_aug=[{"shift": {"by": 2}}]), train=True)(image)
    torch.testing.assert_close(shifted, plain + 2)
