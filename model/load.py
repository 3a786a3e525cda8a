"""Weights from elsewhere: read, recognised, renamed, and put in place entirely or not at all, with a report."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from configs.schema import InitConfig
from model.checkpoints.files import read_weights, state_dict_of
from model.checkpoints.formats import FORMATS, recognise
from model.task import RetrievalTask
from utils.errors import CheckpointError, ConfigError
from utils.logger import format_table

EXTRA = ("encoder.selection.", "encoder.fusion.")  # behind the towers, which are whole without them
CLASSIFIER = "objectives.id.classifier."  # its size is that of the data set it was trained on


@dataclass
class LoadReport:
    """What became of a file's tensors, by our names; `unexpected` ones keep the file's where they have none of ours."""

    source: str
    format: str
    epoch: int | None = None  # of the checkpoint, where it says so
    loaded: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)  # among the loaded: position grids of another image size
    missing: list[str] = field(default_factory=list)  # ours that the file does not have: they start fresh
    skipped: list[str] = field(default_factory=list)  # asked to start fresh, although the file has them
    dropped: list[str] = field(default_factory=list)  # a classifier for another number of identities: starts fresh
    unexpected: list[str] = field(default_factory=list)  # the file's that this model does not have

    def table(self) -> str:
        """Counts by part of the model; what was changed or left out is named."""
        rows = [
            ("loaded", self.loaded, _parts(self.loaded)),
            ("resized", self.resized, ", ".join(self.resized)),
            ("missing, start fresh", self.missing, _parts(self.missing)),
            ("skipped, start fresh", self.skipped, ", ".join(self.skipped)),
            ("of another size, start fresh", self.dropped, ", ".join(self.dropped)),
            ("unexpected, not used", self.unexpected, _parts(self.unexpected)),
        ]
        table = format_table(["tensors", "number", "which"], [(what, len(names), which) for what, names, which in rows])
        return f"weights of {self.source}, format {self.format}\n{table}"


def load_weights(
    task: RetrievalTask, path: str | Path, *, format: str | None = None, skip: Sequence[str] = ()
) -> LoadReport:
    """Load a checkpoint of any known format into `task`: heads may be missing, the encoder's weights may not.

    Args:
        task: a RetrievalTask; one without objectives takes the encoder alone.
        path: what `read_weights` reads.
        format: null: recognised by the tensors' names.
        skip: regular expressions; tensors whose name here has a match are left as they are.

    Raises:
        CheckpointError: unreadable, of no known format, or not fitting `task`, which then is as it was.
        ConfigError: there is no such format, or nothing to skip.
    """
    content = read_weights(path)
    state = state_dict_of(content, path)
    if format is None:
        format = recognise(state)
        if format is None:
            raise CheckpointError(
                f"{path}: of no format known here ({', '.join(FORMATS)}); its tensors are called "
                f"{', '.join(list(state)[:3])}, ..."
            )
    epoch = content.get("epoch")
    report = LoadReport(str(path), format, epoch if isinstance(epoch, int) else None)
    try:
        converted = FORMATS.get(format, "format")(state)
    except (RuntimeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path}: is not of format {format}: {error}") from None
    for pattern in skip:
        matched = [name for name in converted if re.search(pattern, name)]
        if not matched and not any(re.search(pattern, name) for name in report.skipped):
            raise ConfigError(f"init.skip: '{pattern}' matches no tensor of {path}")
        report.skipped += matched
        converted = {name: value for name, value in converted.items() if name not in matched}
    return load_converted(task, converted, report)


def load_init(task: RetrievalTask, init: InitConfig) -> LoadReport | None:
    """Load the weights that a config starts from, where it names a file; errors as `load_weights`."""
    return None if init.path is None else load_weights(task, init.path, format=init.format, skip=init.skip)


def load_converted(task: RetrievalTask, state: Mapping[str, Tensor], report: LoadReport) -> LoadReport:
    """Copy a converted state dict into `task`, position grids resized where they must be; errors as `load_weights`."""
    own, fitting, misfits = task.state_dict(), {}, []
    for name, value in state.items():
        if name not in own:
            report.unexpected.append(name)
            continue
        if value.shape != own[name].shape:
            resized = _resized(task, name, value, report.source)
            if resized is not None:
                report.resized.append(name)
                value = resized
        if value.shape == own[name].shape:
            fitting[name] = value
        elif name.startswith(CLASSIFIER):
            report.dropped.append(name)
        else:
            misfits.append((name, str(tuple(value.shape)), str(tuple(own[name].shape))))
    report.loaded = list(fitting)
    accounted = {*fitting, *report.dropped, *report.skipped, *(name for name, *_ in misfits)}
    report.missing = sorted(own.keys() - accounted)
    _refuse_what_does_not_fit(report, misfits)
    task.load_state_dict(fitting, strict=False)  # floats of any precision are cast to the module's
    return report


def _resized(task: RetrievalTask, name: str, value: Tensor, source: str) -> Tensor | None:
    encoder, _, inner = name.partition(".")
    if encoder != "encoder":
        return None
    try:
        return task.encoder.resize(inner, value)
    except ValueError as error:
        raise CheckpointError(f"{source}: {name} cannot be resized to this image size: {error}") from None


def _refuse_what_does_not_fit(report: LoadReport, misfits: list[tuple[str, str, str]]) -> None:
    missing, unexpected = (
        [name for name in names if name.startswith("encoder.") and not name.startswith(EXTRA)]
        for names in (report.missing, report.unexpected)
    )
    problems = [
        f"{len(names)} of the encoder's tensors {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}"
        for what, names in (("are missing in it", missing), ("are in it, but not in this model", unexpected))
        if names
    ]
    if misfits:
        more = f"\nand {len(misfits) - 10} more" if len(misfits) > 10 else ""
        table = format_table(["tensor", "in the file", "here"], misfits[:10])
        problems.append(f"{len(misfits)} tensors are of another shape\n{table}{more}")
    if problems:
        raise CheckpointError(
            f"{report.source} (format {report.format}) does not fit the model of this config, nothing was loaded: "
            + "; ".join(problems)
        )


def _parts(names: list[str]) -> str:
    """`encoder.image 152, encoder.text 150`."""
    return ", ".join(f"{part} {count}" for part, count in Counter(_part(name) for name in names).items())


def _part(name: str) -> str:
    pieces = name.split(".")
    return ".".join(pieces[:2] if pieces[0] in ("encoder", "objectives") else pieces[:1])
