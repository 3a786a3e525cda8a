"""The trainable whole: an encoder and the objectives that a YAML asks for, as one module."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
import yaml
from torch import Tensor, nn

from configs.schema import Config
from model.convert import load_weights
from model.encoders import ENCODERS, Encoded, Encoder
from model.objectives import OBJECTIVES, Facts, Objective, PartMean, Step, Values
from model.teacher import CachedTeacher, Teacher
from utils.batch import Batch, precise
from utils.checkpoint import load_checkpoint
from utils.config import constructor_options, to_plain, typed
from utils.distributed import gather, rank
from utils.errors import CheckpointError, ConfigError
from utils.registry import did_you_mean

AnyTeacher: TypeAlias = Teacher | CachedTeacher
ROW_FIELDS = ("pids", "clean", "image_ids")  # one value for each row


class RetrievalTask(nn.Module):
    """Runs the encoder once, then every objective on what it gave.

    Args:
        encoder: images and captions -> embeddings.
        objectives: name -> objective, in the order of the log.
    """

    def __init__(self, encoder: Encoder, objectives: dict[str, Objective]) -> None:
        super().__init__()
        self._teacher: list[AnyTeacher] = []  # one or none; in a list, so that it is neither trained nor saved
        for name, objective in objectives.items():
            if objective.reads_tokens and encoder.drops_tokens:
                raise ConfigError(f"losses.{name}: needs all tokens; model.mask_ratio=0 keeps them")
        self.encoder = encoder
        self.objectives = nn.ModuleDict(objectives)
        asked = [objective.captions_from for objective in objectives.values() if objective.captions_from]
        self.caption_field = asked[0] if asked else "caption_ids"
        extra = frozenset().union(*(objective.text_fields for objective in objectives.values()))
        self.text_fields = [self.caption_field, *sorted(extra - {self.caption_field})]
        inputs = frozenset().union(*(objective.inputs for objective in objectives.values()))
        self._inputs = inputs | encoder.inputs | {"images", "pids", *self.text_fields}
        self.full_text = encoder.full_text or any(objective.full_text for objective in objectives.values())

    @property
    def inputs(self) -> frozenset[str]:
        """The batch fields that it reads."""
        return self._inputs if self.teacher is None else self._inputs | self.teacher.inputs

    @property
    def teacher(self) -> AnyTeacher | None:
        return self._teacher[0] if self._teacher else None

    def learn_from(self, teacher: AnyTeacher) -> None:
        """Let the losses that distil learn from this teacher, and from no other."""
        self._teacher = [teacher]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RetrievalTask":
        if self.teacher is not None:
            self.teacher._apply(fn)  # it moves to another device with the rest
        return super()._apply(fn, recurse)

    def forward(self, batch: Batch) -> tuple[Tensor, Values]:
        """The weighted sum of the losses, and what to log: each loss unweighted as `<name>_loss`, accuracies."""
        step = self.encode(batch)
        total = step.image.new_zeros(())
        terms: Values = {}
        for name, objective in self.named_objectives():
            device = step.image.device.type
            precision = objective.autocast and torch.is_autocast_enabled(device)
            trained = objective.weight != 0  # otherwise computed and logged only; a NaN there is no harm
            with torch.autocast(device, enabled=precision), torch.set_grad_enabled(trained):
                loss, values = objective(step)
            if trained:
                total = total + objective.weight * loss
            terms[f"{name}_loss"] = loss.detach()
            terms |= {f"{name}_{key}" if isinstance(value, PartMean) else key: value for key, value in values.items()}
        return total, terms

    def named_objectives(self) -> Iterator[tuple[str, Objective]]:
        """Typed view of `objectives`."""
        return ((name, module) for name, module in self.objectives.items() if isinstance(module, Objective))

    def encode(self, batch: Batch) -> Step:
        """One pass of each tower; several kinds of captions go through the text tower as one batch."""
        image = self.encoder.encode_image(batch["images"])
        ids = torch.cat([batch[name] for name in self.text_fields])
        text = self.encoder.encode_text(ids)
        size = len(batch["images"])
        texts = dict(zip(self.text_fields, text.tokens.split(size), strict=True))
        captions = Encoded(text.embedding[:size], text.tokens[:size], tuple(part[:size] for part in text.more))
        whole = _Whole(batch)
        if not self.encoder.teaches:  # by what belongs to each row
            image, captions = self.encoder.enrich(image, captions, batch)
        image, captions = (whole.encoded(side) for side in (image, captions))
        everyone = whole.fields(batch)
        if self.encoder.teaches:  # by the other rows of the batch
            image, captions = self.encoder.enrich(image, captions, everyone)
        both = zip((image.embedding, *image.more), (captions.embedding, *captions.more), strict=True)
        embeddings = tuple((precise(a), precise(b)) for a, b in both)
        teacher = None
        if self.encoder.teaches:
            teacher = (embeddings[-1][0].detach(), embeddings[-1][1].detach())
        elif self.teacher is not None:
            image_taught, text_taught = self.teacher(batch)
            teacher = (whole.rows(image_taught), whole.rows(text_taught))
        return Step(
            rows=whole.own,
            embeddings=embeddings,
            teacher=teacher,
            pids=everyone["pids"],
            logit_scale=self.encoder.logit_scale,
            image_tokens=image.tokens,
            caption_ids=batch[self.caption_field],
            text_tokens=texts[self.caption_field],
            texts=texts,
            batch=everyone,
        )

    def encode_image(self, images: Tensor) -> Encoded:
        return self.encoder.encode_image(images)

    def encode_text(self, caption_ids: Tensor) -> Encoded:
        return self.encoder.encode_text(caption_ids)


class _Whole:
    """Puts the rows of all processes together, with their gradient; with one process they are whole already."""

    def __init__(self, batch: Batch) -> None:
        self.sizes: list[int] | None = None  # rows of each process
        self.own = len(batch["images"])
        if "shards" in batch:
            self.pairs = batch["shards"].tolist()
            views = self.own // len(batch["index"])  # rows of a pair
            self.sizes = [views * pairs for pairs in self.pairs]
            self.own = self.sizes[rank()]

    def rows(self, local: Tensor) -> Tensor:
        return local if self.sizes is None else gather(local[: self.own], self.sizes)

    def fields(self, batch: Batch) -> Batch:
        """The batch with those of its fields that go with the embeddings whole."""
        whole = {name: self.rows(batch[name]) for name in ROW_FIELDS if name in batch}
        if self.sizes is not None:
            whole["index"] = gather(batch["index"][: self.pairs[rank()]], self.pairs)
        return batch | whole

    def encoded(self, local: Encoded) -> Encoded:
        """Whole embeddings; the tokens stay this process's."""
        return Encoded(self.rows(local.embedding), local.tokens, tuple(self.rows(part) for part in local.more))


def resolve(config: Config) -> Config:
    """The config with every option of its encoder and losses spelt out, all of them checked.

    Raises:
        ConfigError: an unknown encoder, loss or option; no loss at all.
    """
    model = {"name": config.model.get("name"), **to_plain(_encoder(config)[1])}
    losses = {name: to_plain(options) for name, (_, options) in _objectives(config).items()}
    return dataclasses.replace(config, model=model, losses=losses)


def build_encoder(config: Config, *, pretrained: bool = True) -> Encoder:
    """The encoder of a config.

    Args:
        pretrained: False leaves out what `pretrained` options ask for, because a checkpoint is loaded over it, as it
            is where the config has an `init.path`.
    """
    encoder, options = _encoder(config)
    pretrained = pretrained and config.init.path is None
    return encoder(config.data.image_size, config.data.text_length, pretrained, **options)


def build_task(config: Config, num_pids: int | None, *, pretrained: bool = True) -> RetrievalTask:
    """The task of a config; raises `ConfigError` like `resolve`.

    Args:
        num_pids: training identities; None: the encoder alone, for evaluation.
        pretrained: as in `build_encoder`.
    """
    encoder = build_encoder(config, pretrained=pretrained)
    if num_pids is None:
        return RetrievalTask(encoder, {})
    facts = Facts(
        num_pids, encoder.embed_dim, encoder.vocab_size, noise_rate=config.data.noise_rate, dataset=config.data.dataset
    )
    objectives = {name: objective(facts, **options) for name, (objective, options) in _objectives(config).items()}
    return RetrievalTask(encoder, objectives)


def needs_teacher(config: Config) -> bool:
    """Whether some loss distils, and the encoder does not teach itself.

    Raises:
        ConfigError: that is so, and no teacher is named; the message says how to make one.
    """
    if ENCODERS.get(config.model["name"], "model.name").teaches or not any(
        OBJECTIVES.get(name, f"losses.{name}").needs_teacher for name in config.losses
    ):
        return False
    if config.teacher.checkpoint is None:
        make = config.teacher.config or "configs/lcr2s_teacher.yaml"
        raise ConfigError(
            "teacher.checkpoint: this config distils from a trained teacher, and none is named; to make one:\n"
            f"  python train.py --config {make} --run runs/teacher\n"
            "then give this command also: --set teacher.checkpoint=runs/teacher/last.pt"
        )
    return True


def build_teacher(config: Config) -> Teacher:
    """The teacher of a config, built as its own checkpoint says.

    Raises:
        ConfigError: it was trained on other images or with another tokenizer.
        CheckpointError: it is no checkpoint of train.py, or damaged.
    """
    path = str(config.teacher.checkpoint)
    text = load_checkpoint(path).get("config")
    if not isinstance(text, str):
        raise CheckpointError(f"{path}: is no checkpoint of train.py, so it does not say how its encoder is built")
    own = typed(Config, yaml.safe_load(text))
    for name in ("image_size", "image_mean", "image_std", "tokenizer", "text_length"):
        theirs, ours = getattr(own.data, name), getattr(config.data, name)
        if theirs != ours:
            raise ConfigError(f"data.{name}: {ours}, but the teacher ({path}) was trained with {theirs}")
    task = build_task(own, None, pretrained=False)
    load_weights(task, path, format="own")
    return Teacher(task.encoder)


def _encoder(config: Config) -> tuple[Callable[..., Encoder], dict[str, Any]]:
    if not isinstance(config.model.get("name"), str):
        raise ConfigError(f"model.name: which encoder? {did_you_mean('', ENCODERS)}")
    encoder = ENCODERS.get(config.model["name"], "model.name")
    options = {key: value for key, value in config.model.items() if key != "name"}
    return encoder, constructor_options(encoder, options, "model")


def _objectives(config: Config) -> dict[str, tuple[Callable[..., Objective], dict[str, Any]]]:
    if not config.losses:
        raise ConfigError(f"losses: there is none to train with; {did_you_mean('', OBJECTIVES)}")
    found: dict[str, tuple[Callable[..., Objective], dict[str, Any]]] = {}
    for name, options in config.losses.items():
        objective = OBJECTIVES.get(name, f"losses.{name}")
        found[name] = (objective, constructor_options(objective, options, f"losses.{name}"))
    return found
