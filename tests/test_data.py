"""From annotation files to batches: records, errors that name the file, determinism, and what a batch holds."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from configs.schema import CLIP_MEAN, CLIP_STD, DataConfig
from datasets.annotations import load_annotations
from datasets.collate import Collate, longest
from datasets.images import read_image
from datasets.loaders import build_eval_loaders, build_train_loader, data_tokenizer, num_workers
from datasets.samplers import RandomBatches
from datasets.transforms import build_transform
from utils.batch import FIELDS
from utils.errors import ConfigError, DataError


def train_loader(
    root: Path, fields=tuple(FIELDS), *, workers: int = 0, seed: int = 1, full_text: bool = False, **options
):
    aug = ["flip", "pad_crop", "erase"]
    config = DataConfig(root=str(root), image_size=(64, 32), image_aug=aug, batch_size=6, workers=workers, **options)
    annotations = load_annotations("synthetic", root)
    tokenizer = data_tokenizer(config, annotations.folder, most=10**6)
    return build_train_loader(
        config, annotations, tokenizer, fields=set(fields), full_text=full_text, seed=seed, pin_memory=False
    )


def test_a_batch_holds_exactly_the_fields_asked_for(root: Path) -> None:
    loader = train_loader(root)
    batch = next(iter(loader.epoch(1)))
    assert set(batch) == set(FIELDS)
    size, length = batch["caption_ids"].shape
    assert batch["images"].shape == (size, 3, 64, 32) and batch["images"].dtype == torch.float32
    assert batch["mlm_ids"].shape == batch["mlm_labels"].shape == (size, length)
    assert length == longest(batch["caption_ids"]) < 77
    assert batch["mlm_positions"].tolist() == [
        i * length + j for i in range(size) for j in range(length) if batch["mlm_labels"][i, j] != 0
    ]
    some = next(iter(train_loader(root, ["images", "pids"]).epoch(1)))
    assert set(some) == {"images", "pids"}
    assert next(iter(train_loader(root, full_text=True).epoch(1)))["mlm_ids"].shape == (size, 77)


def test_pids_are_labels_and_index_leads_back_to_the_pair(root: Path) -> None:
    loader = train_loader(root)
    seen = []
    for batch in loader.epoch(1):
        for index, label in zip(batch["index"].tolist(), batch["pids"].tolist(), strict=True):
            record = loader.pairs.pairs[index].record
            assert loader.pairs.labels[record.pid] == label
            seen.append(index)
    assert sorted(seen) == list(range(len(loader.pairs))) and len(seen) == 8 * 2 * 2
    assert {loader.pairs.labels[record.pid] for record, *_ in loader.pairs.pairs} == set(range(8))


def test_epochs_differ_and_repeat_whatever_the_workers(root: Path) -> None:
    alone, helped = train_loader(root), train_loader(root, workers=1)
    for epoch in (1, 2):
        for a, b in zip(alone.epoch(epoch), helped.epoch(epoch), strict=True):
            assert all(torch.equal(a[name], b[name]) for name in FIELDS)
    first, second = (list(alone.epoch(epoch)) for epoch in (1, 2))
    again = list(alone.epoch(1))
    assert all(torch.equal(a["images"], b["images"]) for a, b in zip(first, again, strict=True))
    by_index = [
        {
            int(i): (image, ids)
            for b in batches
            for i, image, ids in zip(b["index"], b["images"], b["mlm_labels"], strict=True)
        }
        for batches in (first, second)
    ]
    changed = [not torch.equal(by_index[0][i][0], by_index[1][i][0]) for i in by_index[0]]
    assert sum(changed) > len(changed) // 2  # augmentation is drawn anew each epoch
    other_seed = next(iter(train_loader(root, seed=2).epoch(1)))
    assert not torch.equal(other_seed["index"], first[0]["index"])


def test_loading_leaves_the_global_random_state_alone(root: Path) -> None:
    loader = train_loader(root)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    loader.pairs[3]
    assert torch.equal(torch.rand(1), expected)


def test_random_batches_cover_each_epoch_once() -> None:
    batches = RandomBatches(23, 5, seed=1)
    orders = []
    for epoch in (1, 2):
        batches.set_epoch(epoch)
        epoch_batches = list(batches)
        assert len(epoch_batches) == len(batches) == 5
        orders.append([index for batch in epoch_batches for index in batch])
        assert sorted(orders[-1]) == list(range(23))
    assert orders[0] != orders[1]


def test_evaluation_loaders_keep_annotation_order_and_raw_pids(root: Path) -> None:
    annotations = load_annotations("synthetic", root)
    config = DataConfig(root=str(root), image_size=(64, 32), workers=0)
    loaders = build_eval_loaders(
        config, annotations.test, data_tokenizer(config, annotations.folder, most=10**6), batch_size=5, pin_memory=False
    )
    gallery = torch.cat([batch["pids"] for batch in loaders.gallery])
    query = torch.cat([batch["pids"] for batch in loaders.query])
    assert gallery.tolist() == [record.pid for record in annotations.test]
    assert query.tolist() == [record.pid for record in annotations.test for _ in record.captions]


def test_an_empty_caption_and_one_that_is_too_long_can_be_trained_on(root: Path) -> None:
    loader = train_loader(root)
    pair = loader.pairs.pairs[0]
    loader.pairs.pairs[:2] = [pair._replace(caption=caption) for caption in ("", "red shirt and " * 60)]
    batch = Collate(full_text=True)([loader.pairs[0], loader.pairs[1]])
    end = loader.pairs.tokenizer.mask_id + 2
    assert batch["caption_ids"][0].tolist()[:3] == [end - 1, end, 0]
    assert batch["caption_ids"][1, -1] == end and (batch["caption_ids"][1] != 0).all()
    assert (batch["mlm_labels"] != 0).any(dim=1).all()


# --- images ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_image_is_named_and_stops_the_loader(workers: int, root: Path, tmp_path: Path) -> None:
    loader = train_loader(root, workers=workers)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(Path(loader.pairs.images.paths[0]).read_bytes()[:700])
    loader.pairs.images.paths[0] = str(broken)
    with pytest.raises(DataError) as caught:
        list(loader.epoch(1))
    assert str(caught.value).startswith(str(broken)) and "Traceback" not in str(caught.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_skipped_image_has_a_stand_in_and_is_remembered(workers: int, root: Path) -> None:
    loader = train_loader(root, workers=workers, on_bad_image="skip")
    gone = ["/nowhere/a.jpg", "/nowhere/b.jpg"]
    loader.pairs.images.paths[0], loader.pairs.images.paths[5] = gone
    before = [batch["index"].tolist() for batch in train_loader(root, workers=workers).epoch(1)]
    after = [batch["index"].tolist() for batch in loader.epoch(1)]
    changed = [(a, b) for x, y in zip(before, after, strict=True) for a, b in zip(x, y, strict=True) if a != b]
    assert sorted(a for a, _ in changed) == [0, 5]
    assert not {b for _, b in changed} & {0, 5}
    assert [batch["index"].tolist() for batch in loader.epoch(1)] == after  # the same stand-ins again
    assert loader.pairs.images.unreadable() == gone


def test_a_stand_in_brings_its_own_image_caption_and_label(root: Path) -> None:
    loader = train_loader(root, on_bad_image="skip")
    loader.pairs.images.paths[0] = "/nowhere/a.jpg"
    item = loader.pairs[0]
    record, caption, _ = loader.pairs.pairs[int(item["index"])]
    assert item["pids"] == loader.pairs.labels[record.pid]
    assert torch.equal(item["caption_ids"], loader.pairs.tokenizer.encode(caption)[None])


def test_skipping_gives_up_where_nothing_can_be_read(root: Path) -> None:
    loader = train_loader(root, on_bad_image="skip")
    loader.pairs.images.paths[:] = ["/nowhere/a.jpg"] * len(loader.pairs)
    with pytest.raises(DataError, match=r"/nowhere/a\.jpg: cannot be read, and neither can 20 others"):
        loader.pairs[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_skipped_gallery_images_leave_the_gallery(workers: int, root: Path) -> None:
    config = DataConfig(root=str(root), image_size=(64, 32), workers=workers, on_bad_image="skip")
    annotations = load_annotations("synthetic", root)
    tokenizer = data_tokenizer(config, annotations.folder, most=10**6)
    loaders = build_eval_loaders(config, annotations.test, tokenizer, batch_size=2, pin_memory=False)
    loaders.images.paths[2:5] = ["/nowhere/c.jpg", "/nowhere/d.jpg", "/nowhere/e.jpg"]
    batches = list(loaders.gallery)
    assert [len(batch.get("pids", [])) for batch in batches] == [2, 0, 1, 2]
    pids = torch.cat([batch["pids"] for batch in batches if batch]).tolist()
    assert pids == [record.pid for i, record in enumerate(annotations.test) if i not in (2, 3, 4)]
    assert loaders.images.unreadable() == ["/nowhere/c.jpg", "/nowhere/d.jpg", "/nowhere/e.jpg"]


def test_images_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nobody\.jpg: no such image"):
        read_image(str(tmp_path / "nobody.jpg"))
    (tmp_path / "text.jpg").write_text("not an image")
    with pytest.raises(DataError, match=r"text\.jpg: this image cannot be read"):
        read_image(str(tmp_path / "text.jpg"))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "CMYK"])
def test_any_image_mode_becomes_rgb(mode: str, tmp_path: Path) -> None:
    name = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.new(mode, (9, 5)).save(name)
    assert read_image(str(name)).mode == "RGB"


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
    steps = build_transform(DataConfig(image_aug=["erase", "flip", "pad_crop"]), train=True).transforms  # type: ignore[attr-defined]
    names = [type(step).__name__ for step in steps]
    assert names == ["Resize", "RandomHorizontalFlip", "Pad", "RandomCrop", "ToTensor", "Normalize", "RandomErasing"]
    erase = steps[-1]
    assert (erase.p, tuple(erase.scale), tuple(erase.ratio), tuple(erase.value)) == (
        0.5,
        (0.02, 0.4),
        (0.3, 3.3),
        CLIP_MEAN,
    )
    assert (steps[2].padding, steps[2].fill) == (10, 0)
    with pytest.raises(ConfigError, match=r"data\.image_aug: unknown 'flop'; did you mean 'flip'"):
        build_transform(DataConfig(image_aug=["flop"]), train=True)


def test_more_workers_than_cores_is_an_error_with_the_number_of_cores() -> None:
    with pytest.raises(ConfigError, match=r"data\.workers: 4096, but this machine has \d+ cores"):
        num_workers(DataConfig(workers=4096))
    assert 1 <= num_workers(DataConfig(workers=None)) <= 8
    assert num_workers(DataConfig(workers=0)) == 0
