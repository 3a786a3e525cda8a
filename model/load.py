"""Loading of weights into a task, entirely or not at all, with a report."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from configs.schema import InitConfig
from model.checkpoints.files import read_weights, state_dict_of
from model.checkpoints.formats import FORMATS, recognise
from model.encoders import ENCODERS
from model.task import RetrievalTask
from utils.errors import CheckpointError, ConfigError
from utils.logger import format_table
from utils.tensors import check_values

CLASSIFIER = "objectives.id.classifier."  # has one row per training identity


@dataclass
class LoadReport:
    """Names of loaded and other tensors, in our naming. `unexpected` keeps foreign names without a match."""

    source: str
    format: str
    epoch: int | None = None  # of the checkpoint, if it says so
    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)  # subset of loaded: position grids of another image size
    missing: list[str] = field(default_factory=list)  # in the model, not in the file: initialised afresh
    skipped: list[str] = field(default_factory=list)  # excluded by init.skip: initialised afresh
    dropped: list[str] = field(default_factory=list)  # classifier of other identities: initialised afresh
    unexpected: list[str] = field(default_factory=list)  # in the file, not in the model

    @property
    def origin(self) -> str:
        """Source of the weights, with the epoch if it is known."""
        return self.source if self.epoch is None else f"{self.source}, epoch {self.epoch}"

    def table(self) -> str:
        """Counts per module; resized and excluded tensors are named."""
        rows = [
            ("loaded", self.loaded, _per_module(self.loaded)),
            ("resized", self.resized, ", ".join(self.resized)),
            ("missing, initialised afresh", self.missing, _per_module(self.missing)),
            ("skipped, initialised afresh", self.skipped, ", ".join(self.skipped)),
            ("other size, initialised afresh", self.dropped, ", ".join(self.dropped)),
            ("unexpected, not used", self.unexpected, _per_module(self.unexpected)),
        ]
        table = format_table(["tensors", "number", "names"], [(what, len(names), which) for what, names, which in rows])
        return f"weights from {self.source}, format {self.format}\n{table}"


def load_weights(
    task: RetrievalTask, path: str | Path, *, format: str | None = None, skip: Sequence[str] = ()
) -> LoadReport:
    """Load a checkpoint of any known format. Loss heads may be missing, weights of the encoder may not.

    Args:
        task: the task to load into; without objectives, it takes the encoder's weights alone.
        path: file or folder, as in `read_weights`.
        format: name of the checkpoint format; None recognises it by the names of the tensors.
        skip: regular expressions; tensors whose name here matches one keep their values.

    Raises:
        CheckpointError: the file is unreadable, of no known format, or does not fit. The task is unchanged then.
        ConfigError: the format does not exist, or a pattern of `skip` matches nothing.
    """
    content = read_weights(path)
    state = state_dict_of(content, path)
    if format is None:
        format = recognise(state)
        if format is None:
            raise CheckpointError(
                f"{path}: unknown checkpoint format, got tensors named {', '.join(list(state)[:3])}, ...; "
                f"known formats are {', '.join(FORMATS)}"
            )
    epoch = content.get("epoch")
    report = LoadReport(str(path), format, epoch if isinstance(epoch, int) else None)
    try:
        converted = FORMATS.get(format, "format")(state)
    except (RuntimeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path}: not of format {format} ({error})") from None
    for pattern in skip:
        matched = [name for name in converted if re.search(pattern, name)]
        if not matched and not any(re.search(pattern, name) for name in report.skipped):
            raise ConfigError(f"init.skip: must match a tensor of {path}, got '{pattern}', which matches none")
        report.skipped += matched
        converted = {name: value for name, value in converted.items() if name not in matched}
    return load_converted(task, converted, report)


def load_init(task: RetrievalTask, init: InitConfig) -> LoadReport:
    """Load the initial checkpoint of a config; errors as `load_weights`."""
    assert init.path is not None
    return load_weights(task, init.path, format=init.format, skip=init.skip)


def load_converted(task: RetrievalTask, state: Mapping[str, Tensor], report: LoadReport) -> LoadReport:
    """Copy a state dict in our naming into `task`, resizing position grids; errors as `load_weights`."""
    current, fitting, misfits = task.state_dict(), {}, []
    check_values({name: value for name, value in state.items() if name in current}, current, report.source)
    for name, value in state.items():
        if name not in current:
            report.unexpected.append(name)
            continue
        if value.shape != current[name].shape:
            resized = _resized(task, name, value, report.source)
            if resized is not None:
                report.resized.append(name)
                value = resized
        if value.shape == current[name].shape:
            fitting[name] = value
        elif name.startswith(CLASSIFIER):
            report.dropped.append(name)
        else:
            misfits.append((name, str(tuple(value.shape)), str(tuple(current[name].shape))))
    report.loaded = list(fitting)
    accounted = {*fitting, *report.dropped, *report.skipped, *(name for name, *_ in misfits)}
    report.missing = sorted(current.keys() - accounted)
    _refuse_misfits(report, misfits)
    task.load_state_dict(fitting, strict=False)  # casts floats of any precision to the module's
    return report


def _resized(task: RetrievalTask, name: str, value: Tensor, source: str) -> Tensor | None:
    module, _, inner = name.partition(".")
    if module != "encoder":
        return None
    try:
        return task.encoder.resize(inner, value)
    except ValueError as error:
        raise CheckpointError(f"{source}: {name} cannot be resized to this image size: {error}") from None


def _refuse_misfits(report: LoadReport, misfits: list[tuple[str, str, str]]) -> None:
    optional = tuple(f"encoder.{prefix}" for encoder in ENCODERS.values() for prefix in encoder.optional_modules)
    missing, unexpected = (
        [name for name in names if name.startswith("encoder.") and not name.startswith(optional)]
        for names in (report.missing, report.unexpected)
    )
    problems = [
        f"{len(names)} tensors of the encoder are {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for what, names in (("missing", missing), ("unexpected", unexpected))
        if names
    ]
    if misfits:
        more = f"\nand {len(misfits) - 10} more" if len(misfits) > 10 else ""
        table = format_table(["tensor", "in the file", "in the model"], misfits[:10])
        problems.append(f"{len(misfits)} tensors have another shape\n{table}{more}")
    if problems:
        raise CheckpointError(
            f"{report.source} (format {report.format}): does not fit the model of this config, nothing was loaded; "
            + "; ".join(problems)
        )


def _per_module(names: list[str]) -> str:
    """Number of tensors per module: `encoder.image 152, encoder.text 150`."""
    return ", ".join(f"{module} {count}" for module, count in Counter(map(_module_of, names)).items())


def _module_of(name: str) -> str:
    pieces = name.split(".")
    return ".".join(pieces[:2] if pieces[0] in ("encoder", "objectives") else pieces[:1])
