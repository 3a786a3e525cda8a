"""The fixed keys of a config: frozen dataclasses with default, bounds and help of each option.

Components that are chosen by name (the encoder under `model`, entries of `losses`, `solver.schedule`, augmentations,
trackers) are not listed here: the constructor is their schema. `train.py --help-config` prints both.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from configs.legacy import upgrade
from utils.config import leaves, load_layers, typed, yaml_problem
from utils.convert import shortened
from utils.errors import ConfigError
from utils.options import option
from utils.paths import names_variable
from utils.patterns import check_pattern
from utils.yaml_text import read_yaml

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_SEED = 2**32 - 1  # NumPy's older generators take no larger seed


@dataclass(frozen=True)
class DataConfig:
    """Data sets, and how their images and captions become batches."""

    dataset: str = option("synthetic", help="name of a data set adapter, see datasets/annotations.py")
    root: str = option("data", path=True, help="folder that holds the data sets' folders", resumable=True)
    image_size: tuple[int, int] = option((384, 128), ge=1, help="height and width in pixels")
    image_mean: tuple[float, float, float] = option(
        CLIP_MEAN, ge=0, le=1, help="RGB mean that the vision tower was trained with"
    )
    image_std: tuple[float, float, float] = option(CLIP_STD, gt=0, le=1, help="RGB deviation, likewise")
    image_aug: list[Any] = option([], deferred=True, help="augmentations of training images: names, or {name: options}")
    train_resize: Literal["bilinear", "bicubic"] = option(
        "bilinear", help="filter for training images; others: bilinear"
    )
    views: int = option(1, ge=1, help="augmented views of each image in a batch")
    text_levels: list[str] = option(["sentence"], help="texts of each caption: word, phrase, sentence")
    word_source: Literal["clause", "attributes"] = option("clause", help="source of the text level `word`")
    text_aug: float = option(0.0, ge=0, le=1, help="fraction of caption tokens masked, replaced or deleted (RDE: 0.2)")
    noise_rate: float = option(0.0, ge=0, lt=1, help="fraction of training captions that are permuted")
    noise_seed: int = option(1, ge=0, le=MAX_SEED, help="seed of the permutation; 1 gives the published ones")
    noise_file: str | None = option(
        None, path=True, help=".npy file with a permutation; needs the noise_rate that it was made with"
    )
    noise_drop: bool = option(False, help="leave out the pairs that the permutation changed (CLIP-C in the literature)")
    support_images: int = option(4, ge=0, help="images in the support set of a pair (LCR2S)")
    support_captions: int = option(4, ge=0, help="captions in the support set of a pair (LCR2S)")
    text_support: Literal["any", "cross_view"] = option("any", help="cross_view: no captions of the pair's own image")
    tokenizer: str | None = option(
        None,
        path=True,
        help="hub name, folder or merges file; captions: learnt from the training captions; null: the one in the data "
        "set's folder",
    )
    text_length: int = option(77, ge=3, help="tokens of a caption, start and end of text included")
    batch_size: int = option(64, ge=2, help="pairs in a step, over all processes")
    sampler: Literal["random", "identity"] = option("random", help="identity: num_instances pairs of each identity")
    num_instances: int = option(4, ge=1, help="pairs of an identity in a batch; a divisor of batch_size")
    val_ids: int = option(200, ge=0, help="training identities held out as val, if there is no val split to select on")
    on_bad_image: Literal["error", "skip"] = option("error", help="skip: replace unreadable images, count and log them")
    cache: Literal["auto", "on", "off"] = option(
        "auto",
        help="decode and resize images once into a file; auto: 2000 images or more, and twice their space is free",
        resumable=True,
    )
    cache_dir: str | None = option(
        None, path=True, help="folder of these files; null: .decoded in data.root, or in ~/.cache", resumable=True
    )
    workers: int | None = option(
        None,
        ge=0,
        help="data loading workers; null: one per core, at most 8 per process; capped at the number of cores",
        resumable=True,
    )
    timeout: int = option(
        300, ge=1, le=10**8, help="seconds to wait for a batch before the run is ended", resumable=True
    )


@dataclass(frozen=True)
class InitConfig:
    """Checkpoint to start from, in place of the towers' pretrained weights."""

    path: str | None = option(
        None, path=True, help="file, or Hugging Face folder; null: pretrained weights as `model` says"
    )
    format: str | None = option(None, help="checkpoint format; null: recognised by the names of the tensors")
    image_size: tuple[int, int] | None = option(
        None, ge=1, help="height and width of its training images; null: from the file, or as its format is published"
    )
    skip: list[str] = option([], help="regular expressions for tensors (by our names) to initialise afresh")


@dataclass(frozen=True)
class TeacherConfig:
    """Teacher of the distillation losses."""

    config: str | None = option(None, path=True, help="YAML that trains a teacher, for the message that tells how")
    checkpoint: str | None = option(None, path=True, help="checkpoint of the teacher, for instance its last.pt")
    cache: bool = option(False, help="encode all training data once, without augmentation, instead of in every step")


@dataclass(frozen=True)
class Rule:
    """Optimizer settings of parameters whose name matches a regular expression."""

    match: str = option("???", help="regular expression, searched in the parameter's dotted name")
    lr_mult: float | None = option(None, ge=0, help="factor on solver.lr; null: as earlier rules set it")
    weight_decay: float | None = option(None, ge=0, help="weight decay; null: as earlier rules set it")


@dataclass(frozen=True)
class SolverConfig:
    """Optimizer and learning-rate schedule."""

    optimizer: Literal["adam", "adamw", "sgd"] = option("adam", help="optimizer")
    lr: float = option(1e-5, ge=0, help="base learning rate")
    betas: tuple[float, float] = option((0.9, 0.999), ge=0, lt=1, help="adam, adamw: decay of both moments")
    eps: float = option(1e-8, gt=0, help="adam, adamw: term in the denominator")
    momentum: float = option(0.9, ge=0, lt=1, help="sgd: momentum")
    weight_decay: float = option(0.0, ge=0, help="coupled (L2) in adam and sgd, decoupled in adamw")
    rules: list[Rule] = option([], help="settings by parameter name; later rules win, key by key")
    schedule: dict[str, Any] = option({}, deferred=True, help="name of a schedule (default: cosine), and its options")


@dataclass(frozen=True)
class TrainConfig:
    """Training loop."""

    epochs: int = option(60, ge=1, help="epochs", resumable=True)
    precision: Literal["fp32", "bf16", "fp16"] = option("fp32", help="autocast precision; weights and losses are fp32")
    matmul: Literal["highest", "high", "medium"] = option(
        "highest", help="float32 products of a step's towers: exact, TF32 on GPUs, bf16; for precision fp32"
    )
    seed: int = option(1, ge=0, le=MAX_SEED, help="seed of weights, shuffling, augmentation and masking")
    clip_grad: float | None = option(None, gt=0, help="largest gradient norm; null: no clipping")
    accumulate: int = option(1, ge=1, help="micro-batches per batch: same gradient, less memory", resumable=True)
    compile: Literal["none", "towers", "step"] = option(
        "none", help="apply torch.compile to each tower, or to the encoder with its losses", resumable=True
    )
    shard: Literal["none", "full"] = option(
        "none", help="full: split weights, gradients and optimizer over processes, for less memory", resumable=True
    )
    ema: float | None = option(None, gt=0, lt=1, help="decay of averaged weights, evaluated and saved; null: none")
    log_every: int = option(100, ge=1, help="steps between log lines", resumable=True)
    preflight: bool | None = option(
        None, help="predict memory and operations of a step after the first ten; null: on GPUs only", resumable=True
    )
    profile: int | None = option(
        None, ge=1, help="steps to write a torch.profiler trace of; null: none", resumable=True
    )
    save_every_steps: int | None = option(
        None, ge=1, help="steps between checkpoints in an epoch; null: one at its end", resumable=True
    )
    keep: Literal["all", "best", "last"] = option(
        "best", help="weights kept beside last.pt: best.pt; all: of every epoch; last: none", resumable=True
    )
    save_precision: Literal["fp32", "bf16", "fp16"] = option(
        "fp32", help="precision of the weights in best.pt and those of every epoch; last.pt is exact", resumable=True
    )
    timeout: int = option(
        600, ge=1, le=10**8, help="seconds to wait for another process before the run is ended", resumable=True
    )
    output: str = option("runs", path=True, help="parent folder of run folders", resumable=True)
    trackers: list[Any] = option(
        ["tensorboard"], deferred=True, help="trackers: names, or {name: options}", resumable=True
    )


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation during and after training."""

    every: int = option(1, ge=1, help="epochs between evaluations; the last epoch is always evaluated")
    select_on: Literal["val", "test"] = option("val", help="split whose R1 selects best.pt")
    batch_size: int = option(256, ge=1, help="images or captions per forward pass", resumable=True)


@dataclass(frozen=True)
class Config:
    """One experiment."""

    name: str = option("run", help="suffix of the run folder's name", resumable=True)
    data: DataConfig = option(DataConfig())
    model: dict[str, Any] = option({}, deferred=True, help="name of an encoder, and its options")
    init: InitConfig = option(InitConfig())
    teacher: TeacherConfig = option(TeacherConfig())
    losses: dict[str, dict[str, Any]] = option({}, deferred=True, help="name of a loss -> its options")
    solver: SolverConfig = option(SolverConfig())
    train: TrainConfig = option(TrainConfig())
    eval: EvalConfig = option(EvalConfig())

    @property
    def carved_val_ids(self) -> int:
        """Number of training identities to hold out, if the data set has no val split."""
        return self.data.val_ids if self.eval.select_on == "val" else 0


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """Read a config from a YAML file and `a.b=c` overrides; raises `ConfigError`."""
    return checked(typed(Config, upgrade(load_layers(path, overrides))))


def parse_config(text: str) -> Config:
    """Read a config from the YAML text inside a checkpoint; raises `ConfigError`."""
    try:
        data = read_yaml(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"not a YAML config: {yaml_problem(error)}") from None
    if not isinstance(data, dict):
        raise ConfigError(f"a config must be a mapping of keys to values, got {type(data).__name__}")
    for path, value in leaves(data):
        if names_variable(str(value)):  # its value would reach messages and saved configs
            raise ConfigError(
                f"{path}: must not name an environment variable in a checkpoint, got {shortened(str(value))}"
            )
    return checked(typed(Config, upgrade(data)))


def checked(config: Config) -> Config:
    """The config itself; raises `ConfigError` if options contradict each other."""
    data, init = config.data, config.init
    if config.train.accumulate > data.batch_size:
        raise ConfigError(
            f"train.accumulate: must be at most data.batch_size ({data.batch_size}), got {config.train.accumulate}"
        )
    if config.train.compile == "step":
        for name, needed in (("accumulate", 1), ("matmul", "highest")):
            if (found := getattr(config.train, name)) != needed:
                raise ConfigError(f"train.{name}: must be {needed} with train.compile=step, got {found}")
    if config.train.compile != "none" and config.train.shard == "full":
        raise ConfigError("train.compile: cannot be combined with train.shard=full; set one of them only")
    if data.sampler == "identity" and data.batch_size % data.num_instances:
        raise ConfigError(
            f"data.batch_size: must be a multiple of data.num_instances ({data.num_instances}), got {data.batch_size}"
        )
    if data.noise_file is not None and data.noise_rate == 0:
        raise ConfigError(
            "data.noise_file: needs data.noise_rate, got 0; set it to the fraction that the file permutes"
        )
    if init.path is None and init.format is not None:
        raise ConfigError("init.format: describes init.path, which is null; set init.path")
    if init.path is None and init.image_size is not None:
        raise ConfigError("init.image_size: describes init.path, which is null; set init.path")
    if init.path is None and init.skip:
        raise ConfigError("init.skip: names tensors of init.path, which is null; set init.path")
    for pattern in init.skip:
        check_pattern(pattern, "init.skip")
    return config
