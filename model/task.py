"""The trainable whole: an encoder and the objectives that a YAML asks for, as one module."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeAlias

import torch
import yaml
from torch import Tensor, nn

from configs.schema import Config
from model.convert import load_weights
from model.encoders import ENCODERS, Encoded, Encoder
from model.objectives import OBJECTIVES, Facts, Objective, PartMean, Step, Values
from model.reading import ABSENT, Read, Whole, own_rows
from model.teacher import CachedTeacher, Teacher
from utils.batch import Batch, precise
from utils.checkpoint import load_checkpoint
from utils.config import constructor_options, to_plain, typed
from utils.distributed import shares
from utils.errors import CheckpointError, ConfigError
from utils.registry import did_you_mean

AnyTeacher: TypeAlias = Teacher | CachedTeacher


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
        return self.losses(self.encode(batch), shares=self.shares([batch])[0])

    def losses(
        self, step: Step, *, tokens: bool | None = None, shares: Mapping[str, Tensor] = MappingProxyType({})
    ) -> tuple[Tensor, Values]:
        """What `forward` returns, of a step.

        Args:
            tokens: only of the objectives that read tokens, or only of those that do not; None: of all.
            shares: what the value of an objective that reads tokens counts for.
        """
        total = step.image.new_zeros(())
        terms: Values = {}
        for name, objective in self.named_objectives():
            if tokens is not None and objective.reads_tokens is not tokens:
                continue
            device = step.image.device.type
            precision = objective.autocast and torch.is_autocast_enabled(device)
            trained = objective.weight != 0  # otherwise computed and logged only; a NaN there is no harm
            with torch.autocast(device, enabled=precision), torch.set_grad_enabled(trained):
                loss, values = objective(step)
            if (share := shares.get(name)) is not None:
                loss = loss * share.to(loss.dtype)
                values = {k: v if isinstance(v, PartMean) else v * share.to(v.dtype) for k, v in values.items()}
            if trained:
                total = total + objective.weight * loss
            terms[f"{name}_loss"] = loss.detach()
            terms |= {f"{name}_{key}" if isinstance(value, PartMean) else key: value for key, value in values.items()}
        return total, terms

    def shares(self, parts: Sequence[Batch]) -> list[dict[str, Tensor]]:
        """What the value of each objective that reads tokens counts for, for each part: scalars.

        The mean over the processes of the sum over the parts is then the mean over all that the whole batch has.
        """
        readers = [(name, objective) for name, objective in self.named_objectives() if objective.reads_tokens]
        if not readers or "shards" not in parts[0]:
            return [{} for _ in parts]
        counts = [[objective.count(part) if own_rows(part) else 0 for _, objective in readers] for part in parts]
        weights = shares(torch.tensor(counts, device=parts[0]["pids"].device))
        return [{name: weight for (name, _), weight in zip(readers, row, strict=True)} for row in weights]

    def named_objectives(self) -> Iterator[tuple[str, Objective]]:
        """Typed view of `objectives`."""
        return ((name, module) for name, module in self.objectives.items() if isinstance(module, Objective))

    def encode(self, batch: Batch) -> Step:
        """What the objectives see of a batch; where several processes train, of all their parts of it."""
        return self.step(self.read(batch), batch)

    def read(self, batch: Batch) -> Read:
        """One pass of each tower; several kinds of captions go through the text tower as one batch."""
        image = self.encoder.encode_image(batch["images"])
        ids = torch.cat([batch[name] for name in self.text_fields])
        text = self.encoder.encode_text(ids)
        size = len(batch["images"])
        texts = dict(zip(self.text_fields, text.tokens.split(size), strict=True))
        captions = Encoded(text.embedding[:size], text.tokens[:size], tuple(part[:size] for part in text.more))
        if not self.encoder.teaches:  # by what belongs to each row
            image, captions = self.encoder.enrich(image, captions, batch)
        return Read(image, captions, texts, None if self.teacher is None else self.teacher(batch))

    def step(self, read: Read, batch: Batch) -> Step:
        """Put what this process has read together with what the others have."""
        whole = Whole(batch)
        image, captions, everyone = whole.encoded(read.image), whole.encoded(read.captions), whole.fields(batch)
        if self.encoder.teaches:  # by the other rows of the batch
            image, captions = self.encoder.enrich(image, captions, everyone)
        both = zip((image.embedding, *image.more), (captions.embedding, *captions.more), strict=True)
        embeddings = tuple((precise(a), precise(b)) for a, b in both)
        teacher = None
        if self.encoder.teaches:
            teacher = (embeddings[-1][0].detach(), embeddings[-1][1].detach())
        elif read.teacher is not None:
            teacher = (whole.rows(read.teacher[0]), whole.rows(read.teacher[1]))
        return Step(
            embeddings=embeddings,
            teacher=teacher,
            pids=everyone["pids"],
            logit_scale=self.encoder.logit_scale,
            image_tokens=image.tokens,
            caption_ids=batch.get(self.caption_field, ABSENT),
            text_tokens=read.texts[self.caption_field],
            texts=read.texts,
            batch=everyone,
        )

    def encode_image(self, images: Tensor) -> Encoded:
        return self.encoder.encode_image(images)

    def encode_text(self, caption_ids: Tensor) -> Encoded:
        return self.encoder.encode_text(caption_ids)


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
    if encoder.batch_statistics and config.train.accumulate > 1:
        raise ConfigError("train.accumulate: a part of a batch has not the batch statistics of all; model.bn=frozen")
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
    try:
        own = typed(Config, yaml.safe_load(text))
    except (yaml.YAMLError, AttributeError, TypeError, ValueError, ConfigError) as error:
        raise CheckpointError(f"{path}: the config in it is not one of this version ({error})") from None
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
