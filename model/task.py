"""The trainable whole: an encoder and the objectives that a YAML asks for, as one module."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor, nn

from model.encoders import Encoded, Encoder
from model.global_batch import ABSENT, Read, Whole, own_rows
from model.objectives import Objective, PartMean, Step, Values
from model.teacher import CachedTeacher, Teacher
from utils.batch import Batch
from utils.distributed import shares
from utils.errors import ConfigError
from utils.precision import precise

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
