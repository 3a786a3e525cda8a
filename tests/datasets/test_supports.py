"""Support sets: their members and masks, and draws that depend on seed, epoch and index alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.schema import DataConfig
from datasets.annotations import Record, load_annotations
from datasets.collate import longest
from datasets.loaders import TrainLoader, build_train_loader, data_tokenizer
from datasets.supports import Supports, draw
from tests.helpers.loaders import fields_of, item_of
from utils.batch import FIELDS, to_device
from utils.errors import ConfigError

SUPPORT = [name for name in FIELDS if name.startswith("support_")]


def support_loader(
    root: Path, fields=("index", "caption_ids", "images", *SUPPORT), train: list[Record] | None = None, **options
) -> TrainLoader:
    options = {"batch_size": 6, "workers": 0, "image_aug": ["flip", "erase"], **options}
    config = DataConfig(root=str(root), image_size=(64, 32), **options)
    annotations = load_annotations("synthetic", root)
    annotations = replace(annotations, train=train or annotations.train)
    tokenizer = data_tokenizer(config, annotations.folder, most=10**6)
    return build_train_loader(
        config, annotations, tokenizer, fields=set(fields), full_text=False, seed=1, pin_memory=False
    )


def people(*images: tuple[int, int, int]) -> list[Record]:
    """Records from (pid, image_id, number of captions), one per pair."""
    return [Record(f"{image}.jpg", pid, image, ("x",) * n, "train") for pid, image, n in images for _ in range(n)]


# --- members ----------------------------------------------------------------------------------------------------------


SOME = people((7, 0, 2), (7, 1, 2), (7, 2, 1), (8, 3, 2), (9, 4, 1))  # pairs 0-1, 2-3, 4; 5-6; 7


@pytest.mark.parametrize("pair", range(8))
@pytest.mark.parametrize("number", [0, 1, 2, 3, 9])
@pytest.mark.parametrize("cross_view", [False, True])
def test_supports_are_others_of_the_identity(pair: int, number: int, cross_view: bool) -> None:
    supports, own = Supports(SOME, cross_view=cross_view), SOME[pair]
    others = [other for other in range(8) if SOME[other].pid == own.pid and other != pair]
    images = {SOME[other].image_id for other in others} - {own.image_id}
    captions = {other for other in others if not cross_view or SOME[other].image_id != own.image_id}
    seen: set[int] = set()
    for seed in range(20):
        found, mask = supports.images(pair, number, np.random.default_rng(seed))
        assert found.shape == mask.shape == (number,) and mask.sum() == min(number, len(images))
        real = [SOME[other].image_id for other in found[mask]]
        assert len(set(real)) == len(real) and set(real) <= images
        found, mask = supports.captions(pair, number, np.random.default_rng(seed))
        assert mask.sum() == min(number, len(captions)) and set(found[mask]) <= captions
        assert len(set(found[mask])) == mask.sum() and not found[~mask].any()
        seen |= set(found[mask].tolist())
    if number:
        assert seen == captions  # every candidate is drawn eventually


def test_draws_are_uniform() -> None:
    counts = np.zeros(6)
    for seed in range(3000):
        found, mask = draw([0, 1, 2, 3, 4, 5], 2, np.random.default_rng(seed))
        assert mask.all()
        counts[found] += 1
    np.testing.assert_allclose(counts / 3000, 1 / 3, atol=0.03)


def test_images_and_captions_are_drawn_apart(root: Path) -> None:
    """Images and captions have the same candidates if each image has one caption."""
    image = load_annotations("synthetic", root).train[0].image_path
    train = [Record(image, 1, number, ("a man",), "train") for number in range(6)]
    fields = ("index", "images", "support_image_pairs", "support_caption_pairs")
    loader = support_loader(root, fields, train, support_images=2, support_captions=2)
    (batch,) = fields_of(loader.epoch(1))
    assert (batch["support_image_pairs"] != batch["support_caption_pairs"]).any()


# --- batches ----------------------------------------------------------------------------------------------------------


def test_a_batch_has_the_real_ones_in_a_row_and_masks_for_the_slots(root: Path) -> None:
    loader = support_loader(root, support_images=3, support_captions=2, text_support="cross_view", image_aug=[])
    for batch in fields_of(loader.epoch(1)):
        size = len(batch["index"])
        images, captions = batch["support_image_mask"], batch["support_caption_mask"]
        assert images.shape == (size, 3) and captions.shape == (size, 2)
        assert images.dtype == captions.dtype == torch.bool
        assert images.sum(dim=1).tolist() == [1] * size and captions.all()  # 2 images per person, 2 captions each
        assert batch["support_images"].shape == (size, 3, 64, 32)
        assert batch["support_caption_ids"].shape == (2 * size, longest(batch["support_caption_ids"]))
        pairs = batch["support_image_pairs"][images].tolist()
        for image, pair in zip(batch["support_images"], pairs, strict=True):
            assert torch.equal(image, item_of(loader, pair)["images"][0])
        pairs = batch["support_caption_pairs"][captions].tolist()
        for ids, pair in zip(batch["support_caption_ids"], pairs, strict=True):
            assert torch.equal(ids, loader.pairs[pair]["caption_ids"][0][: len(ids)])
        for index, row in zip(batch["index"].tolist(), batch["support_caption_pairs"].tolist(), strict=True):
            record = loader.pairs.pairs[index].record
            others = [loader.pairs.pairs[other].record for other in row]
            assert all(other.pid == record.pid and other.image_id != record.image_id for other in others)


def test_support_sets_come_from_seed_epoch_and_index_alone(root: Path) -> None:
    """Support sets do not depend on the workers, and differ between epochs."""
    options = {"support_captions": 2}
    alone, helped = support_loader(root, **options), support_loader(root, workers=1, **options)
    epochs = []
    for epoch in (1, 2):
        epochs.append(list(fields_of(alone.epoch(epoch))))
        for a, b in zip(epochs[-1], fields_of(helped.epoch(epoch)), strict=True):
            assert all(torch.equal(a[name], b[name]) for name in SUPPORT)
    drawn = [
        {
            int(i): row.tolist()
            for batch in batches
            for i, row in zip(batch["index"], batch["support_caption_pairs"], strict=True)
        }
        for batches in epochs
    ]
    assert sum(drawn[0][i] != drawn[1][i] for i in drawn[0]) > len(drawn[0]) / 2


def test_a_support_image_is_augmented_for_itself(root: Path) -> None:
    loader = support_loader(root, support_images=1)
    batch = next(iter(fields_of(loader.epoch(1))))
    pairs = batch["support_image_pairs"].flatten().tolist()
    same = [
        torch.equal(a, item_of(loader, p)["images"][0]) for a, p in zip(batch["support_images"], pairs, strict=True)
    ]
    assert not all(same)


def test_the_pair_itself_is_drawn_as_without_support(root: Path) -> None:
    plain, loader = support_loader(root, fields=["index", "images", "caption_ids"], text_aug=0.3), None
    loader = support_loader(root, text_aug=0.3)
    for a, b in zip(fields_of(plain.epoch(1)), fields_of(loader.epoch(1)), strict=True):
        assert torch.equal(a["images"], b["images"]) and torch.equal(a["caption_ids"], b["caption_ids"])


def test_support_captions_are_augmented_too(root: Path) -> None:
    plain, augmented = support_loader(root), support_loader(root, text_aug=0.5)
    a, b = next(iter(fields_of(plain.epoch(1)))), next(iter(fields_of(augmented.epoch(1))))
    assert torch.equal(a["support_caption_pairs"], b["support_caption_pairs"])
    assert a["support_caption_ids"].shape != b["support_caption_ids"].shape or not torch.equal(
        a["support_caption_ids"], b["support_caption_ids"]
    )


def test_an_identity_with_one_image_and_one_caption_has_an_empty_support(root: Path) -> None:
    loader = support_loader(root)
    for pid in {record.pid for record in loader.pairs.supports.records}:  # type: ignore[union-attr]
        for of in (loader.pairs.supports.images_of, loader.pairs.supports.captions_of):  # type: ignore[union-attr]
            of[pid] = of[pid][:1]
    items = [loader.pairs[pair] for pair in (0, 4)]
    assert all(not item[f"support_{kind}_mask"].any() for item in items for kind in ("image", "caption"))
    batch = to_device(loader.loader.collate_fn(items), torch.device("cpu"))
    assert batch["support_images"].shape == (0, 3, 64, 32) and len(batch["support_caption_ids"]) == 0


def test_no_slots_at_all(root: Path) -> None:
    batch = next(iter(fields_of(support_loader(root, support_images=0, support_captions=0).epoch(1))))
    assert batch["support_image_mask"].shape == batch["support_caption_mask"].shape == (6, 0)
    assert len(batch["support_images"]) == len(batch["support_caption_ids"]) == 0


def test_a_support_image_that_cannot_be_read_leaves_its_slot_empty(root: Path) -> None:
    loader = support_loader(root, on_bad_image="skip", image_aug=[])
    other = int(loader.pairs[0]["support_image_pairs"][0, 0])
    loader.pairs.images.paths[other] = "/nowhere.jpg"
    item = loader.pairs[0]
    assert not item["support_image_mask"].any() and len(item["support_images"]) == 0
    assert loader.pairs.images.unreadable() == ["/nowhere.jpg"]


def test_what_nobody_asks_for_is_not_read(root: Path) -> None:
    loader = support_loader(root, fields=["index", "support_image_pairs", "support_image_mask"])
    item = loader.pairs[0]
    assert "support_images" not in item and "support_caption_ids" not in item
    assert support_loader(root, fields=["index"]).pairs.supports is None


def test_several_views_and_support_sets_do_not_go_together(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.views: support sets need one view"):
        support_loader(root, views=2)
