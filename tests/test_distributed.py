"""Several processes train as one does: gradients, batches, metrics, whole and resumed runs; an error ends all."""

import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import train as train_program
from configs.schema import Config, load_config
from datasets.annotations import load_annotations
from datasets.loaders import build_eval_loaders, build_train_loader, data_tokenizer, num_workers
from model.build import build_encoder, build_task, resolve
from model.load import load_weights
from model.task import RetrievalTask
from model.teacher import CachedTeacher, Teacher
from processor.clean_pairs import pair_objectives
from processor.evaluator import embed
from processor.gradient_cache import backward
from processor.teacher_cache import fill_cache
from tests.conftest import ROOT, TINY, TINY_IVT
from tests.test_resume import Killed, die_after, same_runs
from utils import distributed
from utils.checkpoint import load_checkpoint
from utils.distributed import (
    average_gradients,
    gather,
    gather_objects,
    mean_of_processes,
    rank,
    shard_sizes,
    shares,
    start_processes,
)
from utils.errors import ConfigError

# One process imports everything, the others are forked from it.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.test_distributed"])


def _enter(function: Callable[..., Any], number: int, world: int, port: int, queue: Any, arguments: tuple) -> None:
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(world), "LOCAL_RANK": str(number)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    try:
        start_processes()
        result = function(*arguments)
        queue.put((number, True, result))
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        queue.put((number, False, traceback.format_exc()))
        queue.close()
        queue.join_thread()  # it has been written
        os._exit(1)


def together(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function` returns in each of `world` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = CONTEXT.Queue()
    processes = [
        CONTEXT.Process(target=_enter, args=(function, number, world, port, queue, arguments))
        for number in range(world)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        for _ in processes:
            number, fine, result = queue.get(timeout=120)
            assert fine, f"process {number}: {result}"
            results[number] = result
    finally:
        for process in processes:
            process.join(timeout=10)
            process.kill()
    return [results[number] for number in range(world)]


# --- gathering ------------------------------------------------------------------------------------------------------


def _gathered(size: int) -> tuple[Any, ...]:
    sizes = shard_sizes(size)
    first = sum(sizes[: rank()])
    whole = torch.arange(size * 3, dtype=torch.float64).view(size, 3) / 7
    local = whole[first : first + sizes[rank()]].clone().requires_grad_()
    found = gather(local, sizes)
    weights = torch.linspace(1, 2, size, dtype=torch.float64)[:, None]
    (weights * found.square()).sum().backward()
    flags = gather(torch.tensor([True, False, True])[: sizes[rank()]], sizes)
    mean = local.detach().sum() / max(len(local), 1) * shares(torch.tensor([[len(local)]])).item()
    return found.detach().numpy(), local.grad.numpy(), flags.numpy(), float(mean), gather_objects(rank())  # type: ignore[union-attr]


@pytest.mark.parametrize("world, size", [(2, 4), (2, 5), (3, 7), (3, 2)])
def test_gathering(world: int, size: int) -> None:
    whole = torch.arange(size * 3, dtype=torch.float64).view(size, 3) / 7
    expected = 2 * whole * torch.linspace(1, 2, size, dtype=torch.float64)[:, None]
    results = together(world, _gathered, size)
    gradients = torch.cat([torch.from_numpy(gradient) for _, gradient, *_ in results])
    torch.testing.assert_close(gradients / world, expected)  # the sum over processes, whose mean is taken at the end
    for found, _, flags, _, order in results:
        assert torch.equal(torch.from_numpy(found), whole) and order == list(range(world)) and len(flags) == size
    means = [mean for *_, mean, _ in results]
    assert sum(means) / world == pytest.approx(float(whole.sum()) / size)


def _averaged() -> list[Any]:
    module = torch.nn.ModuleList([torch.nn.Linear(3, 2), torch.nn.Linear(2, 1).double(), torch.nn.Linear(4, 4)])
    for place, parameter in enumerate(module.parameters()):
        if place < 4:  # the last one is not used
            parameter.grad = torch.full_like(parameter, float(rank() + place))
    average_gradients(module.parameters())
    return [None if parameter.grad is None else parameter.grad.unique().tolist() for parameter in module.parameters()]


def test_gradients_are_averaged() -> None:
    assert together(2, _averaged) == [[[0.5], [1.5], [2.5], [3.5], None, None]] * 2


# --- one step -------------------------------------------------------------------------------------------------------

METHODS: dict[str, list[str]] = {
    "baseline": [],
    "irra": [],
    "irra_clean": ["losses.mlm.clean_captions=true", "losses.id.weight=0.5"],
    "ivt": [],
    "rde": ["data.noise_rate=0.5"],
    "lcr2s": [],
    "lcr2s_joint": ["data.num_instances=2"],
}


def config_of(method: str, root: Path, *more: str) -> Config:
    tiny = TINY_IVT if method == "ivt" else TINY
    path = ROOT / f"configs/{method.removesuffix('_clean')}.yaml"
    return resolve(load_config(path, [*tiny, f"data.root={root}", *METHODS.get(method, []), *more]))


def task_of(config: Config) -> RetrievalTask:
    """In float64, with weights that matter, and what a run would have decided before its first step."""
    torch.manual_seed(0)
    task = build_task(config, num_pids=8)
    if any("distill" in name for name in config.losses) and not task.encoder.teaches:
        teacher = load_config(ROOT / "configs/lcr2s_teacher.yaml", TINY)
        task.learn_from(Teacher(build_encoder(teacher)))
    with torch.no_grad():
        for module in (task, *filter(None, [task.teacher])):
            for parameter in module.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    for objective in pair_objectives(task).values():
        if objective.fit is not None:
            objective.counted = torch.arange(32) % 3 != 0
    return task.double().eval()  # without dropout and masks, which every process draws for itself


def parts_of(config: Config, task: RetrievalTask, number: int) -> list[dict[str, Tensor]]:
    """Of a batch, in float64."""
    annotations = load_annotations("synthetic", config.data.root)
    tokenizer = data_tokenizer(config.data, annotations.folder, most=1024, kinds=task.encoder.tokenizers)
    fields = task.inputs | {"index", "clean"}
    count = config.train.accumulate
    options = {"fields": fields, "full_text": task.full_text, "seed": 1, "pin_memory": False, "parts": count}
    loader = build_train_loader(config.data, annotations, tokenizer, **options)
    parts = list(zip(*[loader.epoch(1)] * count, strict=True))[number]
    return [{name: v.double() if v.is_floating_point() else v for name, v in part.items()} for part in parts]


def step_of(config: Config, number: int) -> tuple[float, dict[str, Any], list[float]]:
    """The loss of a batch, all gradients and the terms of the log, which are in alphabetical order."""
    task, cpu = task_of(config), torch.device("cpu")
    parts = parts_of(config, task, number)
    total, terms = backward(task, parts, device=cpu, precision="fp32", scale=lambda loss: loss)
    average_gradients(task.parameters())
    gradients = {name: p.grad.numpy() for name, p in task.named_parameters() if p.grad is not None}
    values = [mean_of_processes(value) for _, value in sorted(terms.items()) if isinstance(value, Tensor)]
    return float(mean_of_processes(total)), gradients, [float(value) for value in values]


def same_step(one: tuple[float, dict[str, Any], list[float]], other: tuple[float, dict[str, Any], list[float]]) -> None:
    (total, gradients, terms), (expected, others, other_terms) = one, other
    assert total == pytest.approx(expected, rel=1e-10)
    assert terms == pytest.approx(other_terms, rel=1e-10)
    assert set(gradients) == set(others)
    for name, gradient in others.items():
        assert abs(gradients[name] - gradient).max() <= 1e-10 * max(abs(gradient).max(), 1e-3), name


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradients_are_those_of_one_process(method: str, world: int, root: Path) -> None:
    size = {2: 7, 4: 10}[world]  # of 32 pairs: the last batch has 4 for 2 processes, and 2 for 4
    more = [f"data.batch_size={size}"] if "ivt" not in method and "joint" not in method else []
    config = config_of(method, root, *more)
    numbers = [0, -1] if config.data.sampler == "random" else [0]
    for number in numbers:
        expected, gradients, terms = step_of(config, number)
        for total, found, values in together(world, step_of, config, number):
            same_step((total, found, values), (expected, gradients, terms))


def test_token_losses_are_of_each_process_weighted_by_its_pairs(root: Path) -> None:
    config = config_of("fmfa", root, "losses.asdm=null", "losses.id=null", "losses.mlm=null", "data.batch_size=7")
    task = task_of(config)
    (batch,), expected = parts_of(config, task, 0), 0.0
    for part in (slice(0, 4), slice(4, 7)):
        loss, _ = task({name: value[part] for name, value in batch.items()})
        (loss * len(batch["pids"][part]) / 7).backward()
        expected += float(loss.detach()) * len(batch["pids"][part]) / 7
    for total, found, _ in together(2, step_of, config, 0):
        assert total == pytest.approx(expected, rel=1e-10)
        for name, parameter in task.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(torch.from_numpy(found[name]), parameter.grad, rtol=1e-9, atol=1e-13)


@pytest.mark.parametrize("method", ["irra", "rde", "lcr2s_joint"])
def test_processes_that_take_their_part_in_parts(method: str, root: Path) -> None:
    """The last batch has 2 pairs for 4 parts: one process has stand-ins only."""
    more = ["data.batch_size=10"] if method != "lcr2s_joint" else []
    config = config_of(method, root, *more)
    numbers = [0, -1] if config.data.sampler == "random" else [0]
    for number in numbers:
        expected = step_of(config, number)
        for found in together(2, step_of, config_of(method, root, *more, "train.accumulate=3"), number):
            same_step(found, expected)


# --- batches --------------------------------------------------------------------------------------------------------


def _indices(config: Config) -> list[list[list[int]]]:
    annotations = load_annotations("synthetic", config.data.root)
    tokenizer = data_tokenizer(config.data, annotations.folder, most=1024)
    options = {"fields": {"index", "images"}, "full_text": False, "seed": 1, "pin_memory": False}
    loader = build_train_loader(config.data, annotations, tokenizer, **options)
    return [[batch["index"].tolist() for batch in loader.epoch(2, start)] for start in (0, 2)]


@pytest.mark.parametrize("sampler", ["random", "identity"])
@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_batches_of_one(sampler: str, world: int, root: Path) -> None:
    config = config_of("baseline", root, f"data.sampler={sampler}", "data.num_instances=2", "data.batch_size=8")
    (whole, rest), parts = _indices(config), together(world, _indices, config)
    assert rest == whole[2:]
    for number, batch in enumerate(whole):
        pieces = [part[0][number] for part in parts]
        assert [pair for piece in pieces for pair in piece] == batch  # disjoint, and in the same order
        assert max(map(len, pieces)) - min(map(len, pieces)) <= 1
    assert all(part[1] == part[0][2:] for part in parts)


# --- runs -----------------------------------------------------------------------------------------------------------

FAST = ["train.epochs=5", "solver.lr=2e-4", "solver.eps=1e-6", "solver.schedule.warmup_epochs=1", "train.log_every=1"]


def _train(config: Config, run: Path) -> None:
    train_program.train(config, run)


def lines_of(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["irra", "rde"])
def test_a_run_of_two_processes_is_that_of_one(method: str, root: Path, tmp_path: Path) -> None:
    """20 steps; RDE divides by losses that all processes have."""
    config = config_of(method, root, *FAST, "data.workers=0")
    train_program.train(config, tmp_path / "one")
    together(2, _train, config, tmp_path / "two")
    names = {path.name.split(".")[0] for path in (tmp_path / "one").iterdir()}
    assert {path.name.split(".")[0] for path in (tmp_path / "two").iterdir()} == names
    for one, two in zip(lines_of(tmp_path / "one"), lines_of(tmp_path / "two"), strict=True):
        assert set(one) == set(two)
        for name, value in one.items():
            if "loss" in name or "counted" in name:
                assert two[name] == pytest.approx(value, rel=2e-3), (one["epoch"], name)
    first, second = load_checkpoint(tmp_path / "two/last.pt")["training"]["processes"]
    assert not torch.equal(first["random"]["cpu"], second["random"]["cpu"])  # each would draw its own masks
    log = (tmp_path / "two/train.log").read_text()
    assert "2 processes" in log and log.count("Epoch 1 done") == 1


def test_what_one_process_cannot_read_all_know(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root, tmp_path / "data")
    paths = sorted({record.image_path for record in load_annotations("synthetic", tmp_path / "data").train})
    for path in paths[:3]:
        Path(path).write_bytes(b"no image")
    together(2, _train, config_of("irra", tmp_path / "data", "data.on_bad_image=skip"), tmp_path / "run")
    assert [line["bad_images"] for line in lines_of(tmp_path / "run")] == [3]
    unreadable = load_checkpoint(tmp_path / "run/last.pt")["training"]["unreadable"]
    assert int(unreadable.sum()) == 6  # pairs, which no process has met alone


def _evaluate(config: Config, checkpoint: Path) -> dict[str, float]:
    task = build_task(config, None)
    load_weights(task, checkpoint)
    annotations = load_annotations("synthetic", config.data.root)
    tokenizer = data_tokenizer(config.data, annotations.folder, most=1024)
    loaders = build_eval_loaders(config.data, annotations.train, tokenizer, batch_size=5, pin_memory=False)
    return embed(task.encoder, loaders, torch.device("cpu"), "fp32").rank_images().summary()


@pytest.mark.parametrize("world", [2, 3])
def test_metrics_are_exactly_those_of_one_process(world: int, root: Path, tmp_path: Path) -> None:
    config = config_of("irra", root, *FAST, "train.epochs=2")
    run = train_program.train(config, tmp_path / "run")
    expected = _evaluate(config, run / "last.pt")
    assert together(world, _evaluate, config, run / "last.pt") == [expected] * world


def _cached(config: Config) -> tuple[list[int], Any, Any]:
    """Rows that this process encoded, and the cache's images and captions."""
    torch.manual_seed(0)
    source, seen = Teacher(build_encoder(config)), [0, 0]
    for kind, name in enumerate(["encode_image", "encode_text"]):
        encode = getattr(source.encoder, name)

        def counted(inputs: Tensor, encode=encode, kind: int = kind) -> Any:
            seen[kind] += len(inputs)
            return encode(inputs)

        setattr(source.encoder, name, counted)
    loader = build_train_loader(
        *(config.data, annotations := load_annotations("synthetic", config.data.root)),
        data_tokenizer(config.data, annotations.folder, most=1024),
        **{"fields": frozenset(), "full_text": False, "seed": 1, "pin_memory": False, "parts": 1},
    )
    fill_cache(teacher := CachedTeacher(source), loader.pairs, config, torch.device("cpu"))
    return seen, teacher.images.numpy(), teacher.captions.numpy()


def test_processes_share_the_work_of_a_cached_teacher(root: Path) -> None:
    config = config_of("lcr2s_teacher", root, "eval.batch_size=3")
    (_, *expected) = _cached(config)
    for seen, *found in together(3, _cached, config):
        assert seen in ([6, 11], [5, 11], [5, 10])  # of 16 images and 32 captions
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5)


def _killed(config: Config, run: Path, saves: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        die_after(patch, saves)
        try:
            train_program.train(config, run)
        except Killed:
            raise
        raise AssertionError("went on")


def _resume(run: Path) -> None:
    train_program.resume(run, [])


@pytest.mark.parametrize("method", ["irra", "ivt", "rde"])
def test_a_resumed_run_of_two_processes_is_the_straight_one(method: str, root: Path, tmp_path: Path) -> None:
    config = config_of(method, root, *FAST, "train.epochs=2", "train.save_every_steps=1", "eval.every=2")
    together(2, _train, config, tmp_path / "straight")
    with pytest.raises(AssertionError, match="Killed"):
        together(2, _killed, config, tmp_path / "resumed", 5)
    assert load_checkpoint(tmp_path / "resumed/last.pt")["training"]["batches"] > 0
    together(2, _resume, tmp_path / "resumed")
    same_runs(tmp_path / "straight", tmp_path / "resumed")


# --- torchrun -------------------------------------------------------------------------------------------------------


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "train.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=120, env=environment
    )


def test_an_error_of_one_process_ends_all_with_its_message(root: Path, tmp_path: Path) -> None:
    """Of a real torchrun: it trains an epoch, and the second process meets a bad image when it evaluates."""
    data = tmp_path / "data"
    shutil.copytree(root, data)
    records = load_annotations("synthetic", data).val
    Path(records[-1].image_path).write_bytes(b"no image")  # of the second process's part
    started, run = time.monotonic(), tmp_path / "run"
    done = torchrun("--config", "configs/irra.yaml", "--run-folder", run, "--set", *TINY, f"data.root={data}")
    assert done.returncode != 0 and time.monotonic() - started < 60
    assert "2 processes" in done.stdout and done.stdout.count("Epoch 1 done") == 1
    assert f"error (process 1): {records[-1].image_path}: this image cannot be read" in done.stderr
    others = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert all("another process has ended, see its message" in line for line in others)


def test_processes_of_a_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(ROOT / "configs/irra.yaml").data
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(24)), raising=False)
    found = []
    for processes in (1, 4, 6, 100):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        found.append(num_workers(config))
    assert found == [8, 6, 4, 1]


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "3"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"torchrun --nproc_per_node=4: this machine has 2 GPUs"):
        start_processes()
