"""Needs of a run before it starts: parameters, memory, the largest batch and hours, without data or weights."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from configs.schema import Config
from datasets.annotations import Annotations, load_annotations
from datasets.loaders import build_batches, data_tokenizer, text_notes
from datasets.pairs import pairs_of
from datasets.synthetic.render import FOLDER
from model.encoders import Encoder
from processor.fake_step import Cost, FakeStep
from utils.distributed import default_device, describe_device
from utils.errors import ConfigError, DataError
from utils.logger import format_table
from utils.peaks import PEAKS, peak_flops

BUDGETS = (8, 16, 24, 48, 80)  # GB of GPUs
USABLE = 0.9  # of a GPU's memory; the rest is for its driver and for fragmentation
ACCUMULATE = (2, 4, 8)
MFU = 0.4  # assumed fraction of a GPU's peak
STEP = 4  # ratio of neighbouring sizes whose peak memory is found
MOST_PAIRS = 2**14  # larger batches are not looked for
# Training identities and captions as published (docs/methods/irra.md), and whether there is a val split.
PUBLISHED = {
    "cuhk_pedes": (11_003, 68_126, True),
    "icfg_pedes": (3_102, 34_674, False),
    "rstpreid": (3_701, 37_010, True),
    "synthetic": (800, 6_400, True),
}


class TrainingSet(NamedTuple):
    """Size of a training set."""

    num_pids: int
    num_pairs: int | None  # None if it is not known
    steps: int | None  # of an epoch
    source: str  # where the numbers are from


def report(config: Config) -> str:
    """The text of `train.py --preflight`.

    Args:
        config: resolved config.

    Raises:
        ConfigError: the config cannot be built.
    """
    device = default_device()
    annotations, problem = _annotations(config)
    data = _size(config, annotations)
    step = FakeStep(config, data.num_pids, data.num_pairs or 0, device)
    batch_size = config.data.batch_size
    cost = step.cost(step.batch(batch_size))
    parameters = list(step.task.parameters())
    trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    memory = [f"{size / 2**30:.2f}" for size in (cost.peak, *cost.memory.values())]
    lines = [
        f"{config.name}, {config.train.precision}, kernels of {describe_device(device)}, captions of "
        f"{config.data.text_length} tokens, one process",
        f"parameters: {sum(p.numel() for p in parameters) / 1e6:.2f} M, trained: {trained / 1e6:.2f} M",
        f"a step of {batch_size} pairs: {cost.flops / 1e12:.3g} TFLOP, peak memory in GiB:",
        format_table(["peak", *cost.memory], [memory]),
        f"largest batch, in {USABLE:.0%} of the memory:",
        _largest_batches(config, step, data),
        *_epoch(config, cost, data),
        *([f"data set: {problem}"] if problem else []),
        *_captions(config, annotations, step.task.encoder),
    ]
    return "\n".join(lines)


def _annotations(config: Config) -> tuple[Annotations | None, str]:
    """The data set, or None and the reason why it cannot be read; nothing is rendered."""
    data = config.data
    if data.dataset == "synthetic" and not (Path(data.root) / FOLDER).exists():
        return None, "it is not rendered yet"
    try:
        return load_annotations(data.dataset, data.root, val_ids=config.carved_val_ids), ""
    except DataError as error:
        return None, str(error).splitlines()[0]


def _size(config: Config, annotations: Annotations | None) -> TrainingSet:
    data = config.data
    if annotations is not None:
        pids = [pair.record.pid for pair in pairs_of(annotations.train)]
        steps = len(build_batches(data, pids, config.train.seed))
        return TrainingSet(len(annotations.train_labels), len(pids), steps, str(annotations.folder))
    if data.dataset not in PUBLISHED:
        return TrainingSet(10_000, None, None, "10,000 identities assumed")
    num_pids, num_pairs, has_val = PUBLISHED[data.dataset]
    held_out = 0 if has_val else config.carved_val_ids
    num_pairs = num_pairs * (num_pids - held_out) // num_pids
    steps, source = -(-num_pairs // data.batch_size), f"size of {data.dataset} as published"
    return TrainingSet(num_pids - held_out, num_pairs, steps, source)


def _largest_batches(config: Config, step: FakeStep, data: TrainingSet) -> str:
    unit = config.data.num_instances if config.data.sampler == "identity" else 1
    rows = [[name, *_fitting(peak, parts * unit)] for name, parts, peak in _ways(config, step, data)]
    return format_table(["way", *(f"{budget} GB" for budget in BUDGETS)], rows)


def _ways(config: Config, step: FakeStep, data: TrainingSet) -> Iterator[tuple[str, int, Callable[[int], int]]]:
    """Name of a way to train, its number of micro-batches, and its peak memory by number of pairs."""
    recomputing = FakeStep(with_checkpointing(config), data.num_pids, data.num_pairs or 0, step.device)
    yield "one pass", 1, functools.partial(_at_once, step)
    yield "checkpointing", 1, functools.partial(_at_once, recomputing)
    accumulated = _Accumulated(step)
    for number in ACCUMULATE if step.task.encoder.why_not_accumulate is None else ():
        yield f"train.accumulate={number}", number, functools.partial(accumulated, number)


def _at_once(step: FakeStep, pairs: int) -> int:
    return sum(step.memory(step.batch(pairs, accumulate=1)).values())


class _Accumulated:
    """Peak memory of a batch in several micro-batches, from a step of two of the same size.

    Further micro-batches add rows of embeddings, and what the losses on all of them hold.
    """

    def __init__(self, step: FakeStep) -> None:
        self.step = step
        self.of_two, self.of_embeddings = functools.cache(self._of_two), functools.cache(step.memory_of_embeddings)

    def __call__(self, number: int, pairs: int) -> int:
        size = -(-pairs // number)
        return self.of_two(size) + self.of_embeddings(pairs) - self.of_embeddings(2 * size)

    def _of_two(self, size: int) -> int:
        return sum(self.step.memory(self.step.batch(2 * size, accumulate=2)).values())


def _fitting(peak: Callable[[int], int], unit: int) -> list[str]:
    """The largest batch for each of `BUDGETS`, a multiple of `unit`; a dash where none fits."""
    budgets = [int(USABLE * budget * 2**30) for budget in BUDGETS]
    found = [unit * size for size in largest_sizes(lambda size: peak(size * unit), budgets, MOST_PAIRS // unit)]
    return [f"{pairs or '-'}{'+' * (pairs == MOST_PAIRS // unit * unit)}" for pairs in found]


def largest_sizes(peak: Callable[[int], int], budgets: Sequence[int], most: int) -> list[int]:
    """The largest size, at most `most`, for each budget in ascending order; 0 if not even 1 is within it.

    Peaks are found for few sizes, and lines drawn between them. Peak memory rises in straight lines that become
    steeper, so that the lines between its points are not below it.

    Args:
        peak: size -> peak memory.
        budgets: memory.
        most: largest size.
    """
    known = [(1, peak(1))]
    while known[-1][1] <= budgets[-1] and known[-1][0] < most:
        size = min(STEP * known[-1][0], most)
        known.append((size, peak(size)))
    found = []
    for budget in budgets:
        within = [1 if first <= budget else 0 for _, first in known[:1]]
        for (size, least), (larger, highest) in itertools.pairwise(known):
            if least <= budget:
                reached = size + int((budget - least) * (larger - size) / max(highest - least, 1))
                within.append(min(reached, larger))
        found.append(max(within))
    return found


def with_checkpointing(config: Config) -> Config:
    """The config with recomputed activations in all towers that can."""

    def switched(options: Any) -> Any:
        return (
            {**options, "checkpointing": True} if isinstance(options, dict) and "checkpointing" in options else options
        )

    return dataclasses.replace(config, model={name: switched(options) for name, options in config.model.items()})


def _epoch(config: Config, cost: Cost, data: TrainingSet) -> list[str]:
    """Steps and hours of an epoch."""
    if data.steps is None:
        return [f"epoch: number of steps unknown ({data.source})"]
    total = cost.flops * data.steps
    known = [
        (name, peak)
        for name in PEAKS
        if (peak := peak_flops(name, config.train.precision, config.train.matmul)) is not None
    ]
    rows = [[name, f"{peak / 1e12:.0f}", f"{total / (MFU * peak) / 3600:.3f}"] for name, peak in known]
    return [
        f"epoch: {data.steps} steps ({data.source}); hours at {MFU:.0%} of the peak of one GPU, without evaluation and "
        "if the loader keeps up:",
        format_table(["GPU", "peak, TFLOP/s", "hours an epoch"], rows),
    ]


def _captions(config: Config, annotations: Annotations | None, encoder: Encoder) -> list[str]:
    """Number of captions that are cut, if the data set and its tokenizer are there."""
    if annotations is None:
        return []
    data, folder = config.data, annotations.folder
    try:
        tokenizer = data_tokenizer(
            data, folder, most=encoder.vocab_size, kinds=encoder.tokenizers, learn_from=annotations
        )
    except ConfigError as error:
        return [f"captions that are cut: unknown; {str(error).splitlines()[0]}"]
    notes = text_notes(data, tokenizer, annotations.train, "training")
    return notes or ["data.text_length: no training caption is cut"]
