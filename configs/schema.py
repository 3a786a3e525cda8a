"""Every fixed key a YAML may hold: frozen dataclasses, one line of help per field.

What is chosen by name (the encoder under `model`, each entry of `losses`) is not here: its constructor is its schema.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from utils.config import load_layers, typed
from utils.errors import ConfigError

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class DataConfig:
    """What is read, and how it becomes batches."""

    dataset: str = "synthetic"  # an adapter of datasets/annotations.py
    root: str = "data"  # folder that holds the data sets' folders
    image_size: tuple[int, int] = (384, 128)  # height, width in pixels
    image_mean: tuple[float, float, float] = CLIP_MEAN  # what the vision tower's weights were trained with
    image_std: tuple[float, float, float] = CLIP_STD
    image_aug: list[str] = field(default_factory=list)  # of datasets/transforms.py, applied in that file's order
    train_resize: Literal["bilinear", "bicubic"] = "bilinear"  # of training images; others are resized bilinearly
    views: int = 1  # how often each image is drawn in a batch, each time with its own augmentation
    text_levels: list[str] = field(
        default_factory=lambda: ["sentence"]
    )  # texts of each caption, of datasets/text/levels.py
    word_source: Literal["clause", "attributes"] = "clause"  # what the level `word` draws from
    text_aug: float = 0.0  # part of the tokens of training captions that are masked, replaced or deleted (RDE: 0.2)
    noise_rate: float = 0.0  # part of the training captions that are permuted among each other (noisy correspondence)
    noise_seed: int = 1  # of the permutation; 1 gives the published ones
    noise_file: str | None = None  # a .npy file with the permutation itself; noise_rate must say how much it moves
    noise_drop: bool = False  # leave out the pairs that the permutation changed (what the literature calls CLIP-C)
    support_images: int = 4  # other images of a pair's identity, for encoders and teachers that fuse them
    support_captions: int = 4  # other captions of it
    text_support: Literal["any", "cross_view"] = "any"  # cross_view: none of the pair's own image
    tokenizer: str | None = None  # hub name, tokenizer folder or merges file; null: the one in the data set's folder
    text_length: int = 77  # tokens of a caption, start and end of text included
    batch_size: int = 64  # pairs per step, over all processes
    sampler: Literal["random", "identity"] = "random"  # of pairs, or of identities with num_instances pairs each
    num_instances: int = 4  # identity: pairs of an identity in a batch; batch_size is a multiple of it
    val_ids: int = 200  # training identities held out as val, where there is no val split and eval.select_on is val
    on_bad_image: Literal["error", "skip"] = "error"  # skip: leave images that cannot be read out, count and report
    workers: int | None = None  # data loading processes; null: one per core, at most 8 of each process; 0: none


@dataclass(frozen=True)
class InitConfig:
    """A checkpoint of anyone's to start from, in place of the towers' own pretrained weights."""

    path: str | None = None  # a file, or a folder of Hugging Face; null: what `model` says
    format: str | None = None  # of model/checkpoints/formats.py; null: recognised by the names of its tensors
    skip: list[str] = field(default_factory=list)  # regular expressions: tensors (by our names) that start fresh


@dataclass(frozen=True)
class TeacherConfig:
    """What losses that distil learn from."""

    config: str | None = None  # a YAML that trains one, for the message that says how
    checkpoint: str | None = None  # of such a run, for instance its last.pt
    cache: bool = False  # encode every training image and caption once, as they are, instead of in every step


@dataclass(frozen=True)
class Rule:
    """Optimizer settings for the parameters whose name matches a regular expression."""

    match: str  # searched anywhere in the parameter's dotted name
    lr_mult: float | None = None  # multiplies solver.lr; null: as before this rule
    weight_decay: float | None = None  # replaces solver.weight_decay; null: as before this rule


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over epochs; the formulas are in solver/schedule.py."""

    name: Literal["cosine", "timm_cosine", "step", "linear", "exp", "poly", "constant"] = "cosine"
    warmup_epochs: int = 0  # epochs before the schedule proper begins
    warmup_factor: float = 0.1  # the first epoch's rate, as a part of lr
    warmup: Literal["linear", "constant"] = "linear"  # how the rate moves during warm-up
    warmup_lr: float = 0.0  # timm_cosine: what the rate rises from, in every parameter group
    min_lr: float = 0.0  # where the cosines end and poly starts from, in every parameter group
    milestones: list[int] = field(default_factory=lambda: [20, 50])  # step: epochs after which the rate drops
    gamma: float = 0.1  # step: factor of each drop
    power: float = 0.9  # exp, poly: base of the power


@dataclass(frozen=True)
class SolverConfig:
    """Optimizer and schedule."""

    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    lr: float = 1e-5  # base learning rate
    betas: tuple[float, float] = (0.9, 0.999)  # adam, adamw
    eps: float = 1e-8  # adam, adamw
    momentum: float = 0.9  # sgd
    weight_decay: float = 0.0  # coupled (L2) in adam and sgd, decoupled in adamw
    rules: list[Rule] = field(default_factory=list)  # later rules win, key by key
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


@dataclass(frozen=True)
class TrainConfig:
    """The training loop."""

    epochs: int = 60
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of autocast; weights and losses are fp32 in all three
    seed: int = 1  # of weights, shuffling, augmentation and masking
    clip_grad: float | None = None  # largest gradient norm; null: no clipping
    accumulate: int = 1  # parts that each batch goes through the towers in: the same gradient in less memory
    compile: bool = False  # torch.compile the encoder's towers
    ema: float | None = None  # decay of a running mean of the weights, evaluated and saved beside them; null: none
    log_every: int = 100  # steps between two log lines
    save_every_steps: int | None = None  # batches between two checkpoints within an epoch; null: one at its end only
    output: str = "runs"  # run folders are <output>/<dataset>/<time>_<name>


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation during and after training."""

    every: int = 1  # epochs between two evaluations (the last epoch is always evaluated)
    select_on: Literal["val", "test"] = "val"  # the split whose t2i R1 chooses best.pt
    batch_size: int = 256  # images or captions per forward pass


@dataclass(frozen=True)
class Config:
    """The record of one experiment."""

    name: str = "run"  # ends the run folder's name
    data: DataConfig = field(default_factory=DataConfig)
    model: dict[str, Any] = field(default_factory=dict)  # name: an encoder; the rest: its constructor's options
    init: InitConfig = field(default_factory=InitConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    losses: dict[str, dict[str, Any]] = field(default_factory=dict)  # loss name -> its constructor's options
    solver: SolverConfig = field(default_factory=SolverConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    @property
    def val_ids(self) -> int:
        """Identities to carve a val split of, where the data set has none."""
        return self.data.val_ids if self.eval.select_on == "val" else 0


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> Config:
    """The config that a YAML file and `a.b=c` overrides mean; raises `ConfigError`."""
    config = typed(Config, load_layers(path, overrides))
    _check_least(config)
    _check_sense(config)
    return config


def _check_least(config: Config) -> None:
    """Numbers that are too small to mean anything."""
    least: dict[str, tuple[float | None, float]] = {
        "data.image_size": (min(config.data.image_size), 1),
        "data.text_length": (config.data.text_length, 3),  # start, one token, end
        "data.batch_size": (config.data.batch_size, 2),  # one pair has nothing to be told apart from
        "data.workers": (config.data.workers, 0),
        "data.val_ids": (config.data.val_ids, 0),
        "data.views": (config.data.views, 1),
        "data.text_aug": (config.data.text_aug, 0),
        "data.support_images": (config.data.support_images, 0),
        "data.support_captions": (config.data.support_captions, 0),
        "data.noise_rate": (config.data.noise_rate, 0),
        "data.noise_seed": (config.data.noise_seed, 0),
        "data.num_instances": (config.data.num_instances, 1),
        "solver.lr": (config.solver.lr, 0),
        "solver.weight_decay": (config.solver.weight_decay, 0),
        "solver.schedule.warmup_epochs": (config.solver.schedule.warmup_epochs, 0),
        "train.epochs": (config.train.epochs, 1),
        "train.seed": (config.train.seed, 0),
        "train.accumulate": (config.train.accumulate, 1),
        "train.clip_grad": (config.train.clip_grad, 0),  # below it, training would climb
        "train.log_every": (config.train.log_every, 1),
        "train.save_every_steps": (config.train.save_every_steps, 1),
        "eval.every": (config.eval.every, 1),
        "eval.batch_size": (config.eval.batch_size, 1),
    }
    for path, (value, bound) in least.items():
        if value is not None and not value >= bound:  # not a number is below, too
            what = "must not be negative" if bound == 0 else f"must be at least {bound}"
            raise ConfigError(f"{path}: {what}, is {value}")


def _check_sense(config: Config) -> None:
    """Other values that have the right type and no meaning, alone or beside another one."""
    if config.train.accumulate > config.data.batch_size:
        raise ConfigError(
            f"train.accumulate: {config.train.accumulate} parts of a batch of {config.data.batch_size} pairs"
        )
    if config.train.ema is not None and not 0 < config.train.ema < 1:
        raise ConfigError(f"train.ema: must be above 0 and below 1, is {config.train.ema}")
    data = config.data
    if data.sampler == "identity" and data.batch_size % data.num_instances:
        raise ConfigError(
            f"data.batch_size: {data.batch_size} pairs are no multiple of data.num_instances, {data.num_instances}"
        )
    if data.text_aug > 1:
        raise ConfigError(f"data.text_aug: is a part of the tokens, at most 1, is {data.text_aug}")
    if data.noise_rate >= 1:
        raise ConfigError(f"data.noise_rate: is a part of the captions, less than 1, is {data.noise_rate}")
    if data.noise_file is not None and data.noise_rate == 0:
        raise ConfigError("data.noise_file: needs data.noise_rate, the part of the captions that it moves")
    if min(data.image_std) <= 0:
        raise ConfigError(f"data.image_std: must be above 0, is {list(data.image_std)}")
    if config.init.format is not None and config.init.path is None:
        raise ConfigError("init.format: is the format of init.path, which is not set")
    if config.init.skip and config.init.path is None:
        raise ConfigError("init.skip: names tensors of init.path, which is not set")
    for pattern in config.init.skip:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(f"init.skip: '{pattern}' is no regular expression ({error})") from None
    for path, seed in {"train.seed": config.train.seed, "data.noise_seed": data.noise_seed}.items():
        if seed >= 2**32:  # what NumPy's older generators take
            raise ConfigError(f"{path}: must be less than 2**32, is {seed}")
