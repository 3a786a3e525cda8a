"""Loading of weights into a task, entirely or not at all, with a report."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from configs.schema import DataConfig, InitConfig
from model.checkpoints.architectures import architecture_hint
from model.checkpoints.descriptions import facts_of
from model.checkpoints.facts import UNKNOWN, Facts, compare
from model.checkpoints.files import read_weights, state_dict_of, weights_file
from model.checkpoints.formats import FORMATS, RESNET, recognise
from model.checkpoints.grids import fit_positions
from model.checkpoints.unwrap import without_shared_prefix
from model.encoders import ENCODERS
from model.task import RetrievalTask
from utils.errors import CheckpointError, ConfigError
from utils.logger import format_table
from utils.patterns import matches
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
    notes: list[str] = field(default_factory=list)  # position grids, and what is uncertain

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
    task: RetrievalTask,
    path: str | Path,
    *,
    format: str | None = None,
    image_size: tuple[int, int] | None = None,
    skip: Sequence[str] = (),
    data: DataConfig | None = None,
) -> LoadReport:
    """Load a checkpoint of any known format. Loss heads may be missing, weights of the encoder may not.

    Args:
        task: the task to load into; without objectives, it takes the encoder's weights alone.
        path: file or folder, as in `read_weights`.
        format: name of the checkpoint format; None recognises it by the names of the tensors.
        image_size: height and width of the images that the file was trained with; None takes them from the file, or
            as its format is published.
        skip: regular expressions; tensors whose name here matches one keep their values.
        data: preprocessing, to be compared with the file's; None leaves it out.

    Raises:
        CheckpointError: the file is unreadable, of no known format, or does not fit in its tensors, activations or
            preprocessing. The task is unchanged then.
        ConfigError: the format does not exist, or a pattern of `skip` matches nothing.
    """
    path = weights_file(path)
    content = read_weights(path)
    state = state_dict_of(content, path)
    if resnet := next((name for name in state if RESNET.search(name)), None):
        raise CheckpointError(
            f"{path}: its image tower is a ResNet (tensor {resnet}), which is not supported; use weights of a vision "
            "transformer, such as CLIP's ViT-B/16"
        )
    if format is None:
        format = recognise(state)
        if format is None and (format := recognise(shorter := without_shared_prefix(state))):
            state = shorter
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
    facts = facts_of(format, content, state, path)
    report.notes += compare(facts, task.encoder.activations, data, path)
    for pattern in skip:
        matched = [name for name in converted if matches(pattern, name, "init.skip")]
        if not matched and not any(matches(pattern, name, "init.skip") for name in report.skipped):
            raise ConfigError(f"init.skip: must match a tensor of {path}, got '{pattern}', which matches none")
        report.skipped += matched
        converted = {name: value for name, value in converted.items() if name not in matched}
    return load_converted(task, converted, report, facts, image_size)


def load_init(task: RetrievalTask, init: InitConfig, data: DataConfig | None = None) -> LoadReport:
    """Load the initial checkpoint of a config; arguments and errors as `load_weights`."""
    assert init.path is not None
    return load_weights(task, init.path, format=init.format, image_size=init.image_size, skip=init.skip, data=data)


def load_converted(
    task: RetrievalTask,
    state: Mapping[str, Tensor],
    report: LoadReport,
    facts: Facts = UNKNOWN,
    image_size: tuple[int, int] | None = None,
) -> LoadReport:
    """Copy a state dict in our naming into `task`, resizing position grids; arguments and errors as `load_weights`."""
    current, fitting, misfits = task.state_dict(), {}, []
    check_values({name: value for name, value in state.items() if name in current}, current, report.source)
    for name, value in state.items():
        if name not in current:
            report.unexpected.append(name)
            continue
        patches = task.encoder.patches(name.removeprefix("encoder.")) if name.startswith("encoder.") else None
        if patches is not None and value.ndim == 3 and value.shape[::2] == current[name].shape[::2]:
            try:
                fitted, remark = fit_positions(value, patches, facts, image_size)
            except ValueError as error:
                raise CheckpointError(
                    f"{report.source}: {name} cannot be resized to this image size: {error}; set init.image_size to "
                    "the height and width of its training images"
                ) from None
            report.resized += [name] if fitted is not value else []
            if remark is not None:
                doubt = "; if it is another, set init.image_size" if "assumed" in remark else ""
                report.notes.append(f"position grid {name}: {remark}{doubt}")
            value = fitted
        if value.shape == current[name].shape:
            fitting[name] = value
        elif name.startswith(CLASSIFIER):
            report.dropped.append(name)
        else:
            misfits.append((name, str(tuple(value.shape)), str(tuple(current[name].shape))))
    report.loaded = list(fitting)
    accounted = {*fitting, *report.dropped, *report.skipped, *(name for name, *_ in misfits)}
    report.missing = sorted(current.keys() - accounted)
    _refuse_misfits(report, misfits, architecture_hint(state, current))
    task.load_state_dict(fitting, strict=False)  # casts floats of any precision to the module's
    return report


def _refuse_misfits(report: LoadReport, misfits: list[tuple[str, str, str]], hint: str) -> None:
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
        problems.append(f"{len(misfits)} tensors have another shape\n{table}{more}{_context_hint(misfits)}")
    if problems:
        raise CheckpointError(
            f"{report.source} (format {report.format}): does not fit the model of this config, nothing was loaded; "
            + "; ".join(problems)
            + hint
        )


def _context_hint(misfits: list[tuple[str, str, str]]) -> str:
    """The options for a text tower of another context length."""
    for name, theirs, _ in misfits:
        if name.startswith("encoder.") and name.endswith("position_embedding.weight"):
            length = theirs.strip("()").split(",")[0]
            return (
                f"\nif the context length alone differs, set model.text.options.max_position_embeddings={length} and "
                f"data.text_length to at most {length}"
            )
    return ""


def _per_module(names: list[str]) -> str:
    """Number of tensors per module: `encoder.image 152, encoder.text 150`."""
    return ", ".join(f"{module} {count}" for module, count in Counter(map(_module_of, names)).items())


def _module_of(name: str) -> str:
    pieces = name.split(".")
    return ".".join(pieces[:2] if pieces[0] in ("encoder", "objectives") else pieces[:1])
