"""Samplers: random batches, batches of a few identities, and their shards over processes."""

from collections import Counter
from pathlib import Path

import pytest

from configs.schema import Config
from datasets.annotations import load_annotations
from datasets.loaders import build_train_loader, data_tokenizer
from datasets.samplers import IdentityBatches, RandomBatches
from tests.helpers.configs import config_of
from tests.helpers.loaders import fields_of
from tests.helpers.processes import together


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


# --- identities -------------------------------------------------------------------------------------------------------


def test_identity_batches_are_groups_of_a_few_people() -> None:
    pids = [0] * 9 + [1] * 4 + [2] * 2 + [3] * 8 + [4] * 5
    sampler = IdentityBatches(pids, batch_size=8, num_instances=4, seed=1)
    seen = set()
    for epoch in (1, 2, 3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler) >= 3  # 7 groups: 2, 1, 1, 2, 1
        pairs: Counter[int] = Counter()
        for batch in batches:
            people = Counter(pids[pair] for pair in batch)
            assert set(people.values()) == {4} and len(people) == 2
            pairs.update(batch)
        assert all(count == 1 for pair, count in pairs.items() if pids[pair] != 2)  # replacement only if needed
        assert sum(pids[pair] == 0 for pair in pairs) <= 8
        seen.add(str(batches))
    assert len(seen) == 3
    sampler.set_epoch(1)
    assert str(list(sampler)) in seen


def test_an_identity_with_few_pairs_is_drawn_with_replacement() -> None:
    sampler = IdentityBatches([0, 0, 1, 1, 1, 1], batch_size=8, num_instances=4, seed=1)
    counts = set()
    for epoch in range(1, 30):
        sampler.set_epoch(epoch)
        ((*batch,),) = sampler
        counts.add(sum(pair == 0 for pair in batch))
        assert sum(pair < 2 for pair in batch) == 4
    assert counts >= {1, 2, 3}


def test_all_groups_are_used_until_too_few_people_are_left() -> None:
    sampler = IdentityBatches([pid for pid in range(21) for _ in range(8)], batch_size=28, num_instances=4, seed=3)
    for epoch in range(1, 6):
        sampler.set_epoch(epoch)
        assert 4 <= len(sampler) <= 6 and all(len(batch) == 28 for batch in sampler)  # 42 groups in batches of 7


# --- shards -----------------------------------------------------------------------------------------------------------


def _indices(config: Config) -> list[list[list[int]]]:
    annotations = load_annotations("synthetic", config.data.root)
    tokenizer = data_tokenizer(config.data, annotations.folder, most=1024)
    options = {"fields": {"index", "images"}, "full_text": False, "seed": 1, "pin_memory": False}
    loader = build_train_loader(config.data, annotations, tokenizer, **options)
    return [[batch["index"].tolist() for batch in fields_of(loader.epoch(2, start))] for start in (0, 2)]


@pytest.mark.parametrize("sampler", ["random", "identity"])
@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_batches_of_one(sampler: str, world: int, root: Path) -> None:
    config = config_of("baseline", root, f"data.sampler={sampler}", "data.num_instances=2", "data.batch_size=8")
    (whole, rest), parts = _indices(config), together(world, _indices, config)
    assert rest == whole[2:]
    for number, batch in enumerate(whole):
        pieces = [part[0][number] for part in parts]
        assert [pair for piece in pieces for pair in piece] == batch  # disjoint and in the same order
        assert max(map(len, pieces)) - min(map(len, pieces)) <= 1
    assert all(part[1] == part[0][2:] for part in parts)
