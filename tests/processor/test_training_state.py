"""Check of a training state: random changes of a real one end in one clear error or in a resumed run."""

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from processor import training
from processor.resume import last_state, restore
from processor.trainer import Trainer
from processor.training_state import state_of_step
from solver.optimizer import build_optimizer
from tests.helpers.configs import config_of
from tests.helpers.runs import Killed, die_after
from utils.errors import CheckpointError

PLAIN = [None, "odd", -1, 10**30, 10**9, 1.5, float("nan"), [], {}, {"a": 1}, [1], True]
TENSORS = [torch.zeros(3), torch.zeros(0), torch.zeros((), dtype=torch.int64), torch.eye(2).to_sparse()]
TENSORS += [torch.zeros(2, device="meta"), torch.zeros(5056, dtype=torch.uint8)]


@pytest.fixture(scope="module")
def resumed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, dict[str, Any]]:
    """A trainer that has resumed within the second epoch of RDE with averaged weights, and the content of last.pt."""
    run, trainers = tmp_path_factory.mktemp("state") / "run", []
    more = ("train.epochs=2", "train.save_every_steps=3", "train.ema=0.9", "eval.every=2")
    with pytest.MonkeyPatch.context() as patch:
        die_after(patch, 3)
        with pytest.raises(Killed):
            training.train(config_of("rde", root, *more), run)
        patch.setattr(Trainer, "fit", lambda self: trainers.append(self))
        training.resume(run, [])
    return trainers[0], last_state(run)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all entries in nested mappings and lists."""
    if isinstance(value, dict | list | tuple):
        for key, entry in value.items() if isinstance(value, dict) else enumerate(value):
            yield (*path, key)
            yield from places(entry, (*path, key))


def changed(value: Any, draw: random.Random) -> Any:
    """Another value: of any type, of a neighbouring number, or a tensor of other shape, numbers or kind."""
    others: list[Any] = [*PLAIN, *TENSORS]
    if isinstance(value, Tensor):
        others += [value.double(), value.int(), value.flatten()[:-1], value[None], value.float() * float("nan")]
        others += [torch.randint(256, value.shape).to(value.dtype), -value.float().abs() - 1]
    elif type(value) is int:
        others += [value + 1, value - 1]
    return draw.choice(others)


def mutated(content: dict[str, Any], draw: random.Random) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A copy of the content with an entry that is changed, missing or added, and the entry's path."""
    content = copy.deepcopy(content)
    groups: dict[Any, list[tuple[Any, ...]]] = {}
    for path in places(content["training"], ("training",)):
        groups.setdefault(path[:2], []).append(path)
    path = draw.choice(groups[draw.choice(list(groups))])
    holder: Any = content
    for key in path[:-1]:
        holder = holder[key]
    if isinstance(holder, tuple):
        return path, content
    if (way := draw.random()) < 0.25:
        del holder[path[-1]]
    elif way < 0.3 and isinstance(holder, dict):
        holder["extra"] = changed(None, draw)
    else:
        holder[path[-1]] = changed(holder[path[-1]], draw)
    return path, content


@pytest.mark.parametrize("seed", range(2))
def test_any_change_is_one_clear_error_or_a_resumed_run(seed: int, resumed: tuple[Trainer, dict[str, Any]]) -> None:
    trainer, content = resumed
    draw, refused = random.Random(seed), 0
    metrics = trainer.run / "metrics.jsonl"
    for _ in range(25):
        before = metrics.read_text()
        path, odd = mutated(content, draw)
        try:
            restore(trainer, odd)
        except CheckpointError as error:
            assert "its training state does not fit this version (" in str(error) and len(str(error)) < 2000
            assert metrics.read_text() == before, path
            refused += 1
        else:
            step = trainer.engine.optimizer.step
            for parameter in trainer.task.parameters():
                parameter.grad = torch.zeros_like(parameter)
            step()
            trainer.meters.read()
    assert refused > 10
    restore(trainer, content)


@pytest.mark.parametrize(
    "path, value, message",
    [
        (("epoch",), 7, "history: must have 6 epochs, got 1"),
        (("batches",), 10**9, r"batches: must be at most 4, the batches of epoch 2, got 1000000000"),
        (("history", 0, "test"), 3.0, r"history\[0\]\.test: must be a mapping, got 3\.0"),
        (("record", "lr"), "1e-3", r"record\.lr: must be a number, got '1e-3'"),
        (
            ("optimizer", "state", 3, "exp_avg"),
            torch.zeros(1),
            r"optimizer\.state\[3\]\.exp_avg: must be a float32 ten",
        ),
        (("optimizer", "state", 3, "step"), torch.tensor(-2.0), r"optimizer\.state\[3\]\.step: must be at least 0"),
        (("optimizer", "state", 999), {}, r"optimizer\.state\[999\]: there is no such parameter"),
        (("average", "n_averaged"), torch.tensor(-1), r"average\.n_averaged: must be at least 0"),
        (("objectives", "tal", "clean_mask"), torch.ones(3).bool(), "must be a bool tensor of shape"),
        (("unreadable",), torch.zeros(3), "unreadable: must be a bool tensor of shape"),
        (("processes",), [], "processes: must have at least one entry"),
        (("processes", 0, "random", "cpu"), torch.zeros(9).byte(), r"random\.cpu: must be a uint8 tensor of shape"),
        (("step",), 10**6000, "step: must be a count, got a number with more than 15 digits"),
    ],
    ids=lambda value: "" if type(value) is int else str(value)[:20],
)
def test_the_error_names_the_entry(
    path: tuple[Any, ...], value: Any, message: str, resumed: tuple[Trainer, dict[str, Any]]
) -> None:
    trainer, content = resumed
    content = copy.deepcopy(content)
    holder: Any = content["training"]
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    with pytest.raises(CheckpointError, match=message):
        restore(trainer, content)


@pytest.mark.parametrize("epoch", [None, "2", 0, -1, 2.0, True, 10**30])
def test_an_epoch_that_is_no_count_is_said_before_anything_is_built(epoch: Any, resumed, monkeypatch) -> None:
    trainer, content = resumed
    odd = content | {"training": content["training"] | {"epoch": epoch}}
    monkeypatch.setattr("processor.resume.load_checkpoint", lambda path: odd)
    with pytest.raises(CheckpointError, match="epoch: must be a count from 1"):
        last_state(trainer.run)


@pytest.mark.parametrize("model", [None, {"a": 1}, [], {}])
def test_other_content_than_weights_is_refused(model: Any, resumed) -> None:
    trainer, content = resumed
    with pytest.raises(CheckpointError, match=r"last\.pt: "):
        restore(trainer, content | {"model": model})


@pytest.mark.parametrize("inputs", [None, 3, ["a"]])
def test_odd_hashes_of_the_inputs_are_refused(inputs: Any, resumed) -> None:
    trainer, content = resumed
    with pytest.raises(CheckpointError, match=r"last\.pt: its training state does not fit"):
        restore(trainer, content | {"inputs": inputs})


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_the_expected_state_is_that_of_a_step(name: str) -> None:
    model = nn.Linear(3, 2)
    config = config_of("irra", Path("data"), f"solver.optimizer={name}").solver
    optimizer = build_optimizer(config, model.named_parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    for parameter, state in optimizer.state.items():
        expected = state_of_step(optimizer)
        assert state.keys() == expected.keys()
        for key, like in expected.items():
            assert state[key].shape == (parameter if like is None else like).shape


def test_metrics_of_the_run_are_written_as_they_were(resumed) -> None:
    trainer, content = resumed
    restore(trainer, content)
    lines = [json.loads(line) for line in (trainer.run / "metrics.jsonl").read_text().splitlines()]
    assert lines == content["training"]["history"]
