"""Loaders: fields of a batch, determinism over epochs and workers, number of workers, the pass over all pairs."""

import os
from collections import Counter
from pathlib import Path

import pytest
import torch

from configs.schema import DataConfig, load_config
from datasets.annotations import load_annotations
from datasets.collate import longest
from datasets.images import read_image
from datasets.loaders import SEPARATE_DRAWS, build_eval_loaders, data_tokenizer
from datasets.transforms import build_transform
from datasets.workers import num_workers, worker_notes
from tests.helpers.configs import ROOT, rde_config
from tests.helpers.loaders import fields_of, level_loader, train_loader
from tests.helpers.tasks import flagged_loader_of, task_of
from utils.batch import FIELDS, to_device
from utils.errors import DataError


def test_a_batch_holds_exactly_the_fields_asked_for(root: Path) -> None:
    loader = train_loader(root)
    batch = next(iter(fields_of(loader.epoch(1))))
    assert set(batch) == set(FIELDS)
    size, length = batch["caption_ids"].shape
    assert batch["images"].shape == (size, 3, 64, 32) and batch["images"].dtype == torch.float32
    assert batch["mlm_ids"].shape == batch["mlm_labels"].shape == (size, length)
    assert length == longest(batch["caption_ids"]) < 77
    assert batch["mlm_positions"].tolist() == [
        i * length + j for i in range(size) for j in range(length) if batch["mlm_labels"][i, j] != 0
    ]
    some = next(iter(fields_of(train_loader(root, ["images", "pids"]).epoch(1))))
    assert set(some) == {"images", "pids"}
    assert next(iter(fields_of(train_loader(root, full_text=True).epoch(1))))["mlm_ids"].shape == (size, 77)


def test_pids_are_labels_and_index_leads_back_to_the_pair(root: Path) -> None:
    loader = train_loader(root)
    seen = []
    for batch in fields_of(loader.epoch(1)):
        for index, label in zip(batch["index"].tolist(), batch["pids"].tolist(), strict=True):
            record = loader.pairs.pairs[index].record
            assert loader.pairs.labels[record.pid] == label
            seen.append(index)
    assert sorted(seen) == list(range(len(loader.pairs))) and len(seen) == 8 * 2 * 2
    assert {loader.pairs.labels[record.pid] for record, *_ in loader.pairs.pairs} == set(range(8))


def test_epochs_differ_and_repeat_whatever_the_workers(root: Path) -> None:
    alone, helped = train_loader(root), train_loader(root, workers=1)
    for epoch in (1, 2):
        for a, b in zip(fields_of(alone.epoch(epoch)), fields_of(helped.epoch(epoch)), strict=True):
            assert all(torch.equal(a[name], b[name]) for name in FIELDS)
    first, second = (list(fields_of(alone.epoch(epoch))) for epoch in (1, 2))
    again = list(fields_of(alone.epoch(1)))
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
    assert sum(changed) > len(changed) // 2  # augmentation differs between epochs
    other_seed = next(iter(fields_of(train_loader(root, seed=2).epoch(1))))
    assert not torch.equal(other_seed["index"], first[0]["index"])


def test_the_loader_takes_its_length_from_the_epoch(root: Path) -> None:
    loader = level_loader(root, sampler="identity", num_instances=2)
    for epoch in (1, 2):
        batches = list(fields_of(loader.epoch(epoch)))
        assert len(batches) == len(loader)
        for batch in batches:
            assert Counter(Counter(batch["pids"].tolist()).values()) == {2: 2}


def test_evaluation_loaders_keep_annotation_order(root: Path) -> None:
    annotations = load_annotations("synthetic", root)
    config = DataConfig(root=str(root), image_size=(64, 32), workers=0)
    loaders = build_eval_loaders(
        config, annotations.test, data_tokenizer(config, annotations.folder, most=10**6), batch_size=5, pin_memory=False
    )
    transform, tokenizer = build_transform(config, train=False), data_tokenizer(config, annotations.folder, most=10**6)
    images = [transform(read_image(record.image_path)) for record in annotations.test]
    captions = [tokenizer.encode(caption) for record in annotations.test for caption in record.captions]
    found = [to_device(batch, torch.device("cpu"))["images"] for batch in loaders.gallery]
    assert torch.equal(torch.cat(found), torch.stack(images))
    rows = [ids for batch in loaders.query for ids in batch["caption_ids"]]
    assert [len(ids) for ids in rows] == sorted(len(ids) for ids in rows)  # short captions together
    in_order = [rows[place] for place in loaders.places.tolist()]
    assert all(torch.equal(ids, expected[: len(ids)]) for ids, expected in zip(in_order, captions, strict=True))
    assert loaders.records == annotations.test


@pytest.mark.parametrize("workers", [0, 1])
def test_a_truncated_image_is_named_and_stops_the_loader(workers: int, root: Path, tmp_path: Path) -> None:
    loader = train_loader(root, workers=workers)
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(Path(loader.pairs.images.paths[0]).read_bytes()[:700])
    loader.pairs.images.paths[0] = str(broken)
    with pytest.raises(DataError) as caught:
        list(fields_of(loader.epoch(1)))
    assert str(caught.value).startswith(str(broken)) and "Traceback" not in str(caught.value)


# --- workers ----------------------------------------------------------------------------------------------------------


def test_workers_are_capped_at_the_cores_with_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    for asked, expected in ((0, 0), (3, 3), (None, 3)):
        assert num_workers(DataConfig(workers=asked)) == expected and worker_notes(DataConfig(workers=asked)) == []
    for asked in (4, 4096, 10**30):
        assert num_workers(DataConfig(workers=asked)) == 3
        assert worker_notes(DataConfig(workers=asked)) == [
            f"data.workers: 3 in place of {asked}, one per core of this machine"
        ]


def test_processes_of_a_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(ROOT / "configs/irra.yaml").data
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(24)), raising=False)
    found = []
    for processes in (1, 4, 6, 100):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        found.append(num_workers(config))
    assert found == [8, 6, 4, 1]


# --- the pass over all pairs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", ["random", "identity"])
def test_every_pair_comes_once_whatever_the_sampler(root: Path, sampler: str) -> None:
    config = rde_config(root, f"data.sampler={sampler}")
    loader = flagged_loader_of(config, task_of(config))
    for epoch in (1, 2):
        batches = [batch["index"].tolist() for batch in fields_of(loader.every_pair(epoch))]
        assert Counter(place for batch in batches for place in batch) == Counter(range(len(loader.pairs)))
        assert [len(batch) for batch in batches] == [8, 8, 8, 8]
    assert [b["index"].tolist() for b in fields_of(loader.every_pair(1))] == [
        b["index"].tolist() for b in fields_of(loader.every_pair(1))
    ]
    assert batches != [batch["index"].tolist() for batch in fields_of(loader.every_pair(1))]


def test_its_draws_are_others_than_the_epochs_and_leave_those_alone(root: Path) -> None:
    config = rde_config(root)
    loader = flagged_loader_of(config, task_of(config))
    before = list(fields_of(loader.epoch(1)))
    divided = list(fields_of(loader.every_pair(1)))
    after = list(fields_of(loader.epoch(1)))
    for a, b in zip(before, after, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    assert [batch["index"].tolist() for batch in divided] != [batch["index"].tolist() for batch in before]
    trained, passed = (
        {int(i): image for batch in batches for i, image in zip(batch["index"], batch["images"], strict=True)}
        for batches in (before, divided)
    )
    assert sum(not torch.equal(trained[i], passed[i]) for i in trained) > len(trained) // 2
    assert SEPARATE_DRAWS > 10**9
