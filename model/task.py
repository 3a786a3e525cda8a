"""RetrievalTask: an encoder and its losses as one trainable module."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor, nn

from model.encoders import Encoded, Encoder
from model.objectives import MaskedMean, Metrics, Objective, Step, Tokens
from model.teacher import CachedTeacher, Teacher
from utils.batch import FIELDS, Batch, MicroBatch, send
from utils.distributed import world_size
from utils.errors import ConfigError
from utils.precision import matmul_precision, precise
from utils.sharding import Shard, micro_batch_weights

AnyTeacher: TypeAlias = Teacher | CachedTeacher
# Names of rows that are gathered: embeddings (image.0, text.0, and further ones of the encoder), and batch fields with
# one value per row.
EMBEDDINGS = ("image.", "text.")
ROW_FIELDS = ("pids", "index", "clean", "image_ids")


class RetrievalTask(nn.Module):
    """Runs the encoder once, gathers its embeddings once, then evaluates every objective.

    Args:
        encoder: encoder of images and captions.
        objectives: name -> objective, in the order of the log.
        teacher: frozen encoder that distillation losses learn from; neither trained nor saved.

    Raises:
        ConfigError: an objective reads tokens that the encoder drops.
    """

    def __init__(self, encoder: Encoder, objectives: dict[str, Objective], teacher: AnyTeacher | None = None) -> None:
        super().__init__()
        for name, objective in objectives.items():
            if objective.reads_tokens and encoder.why_no_tokens:
                raise ConfigError(f"losses.{name}: needs all tokens, but {encoder.why_no_tokens}")
        self.encoder = encoder
        self.objectives = nn.ModuleDict(objectives)
        self.notes: list[str] = []  # remarks about the construction and loaded weights, for the log
        self.weights_from: str | None = None  # checkpoint that the weights come from
        self._teacher = [teacher]  # inside a list, so that it does not become a submodule
        asked = [objective.captions_from for objective in objectives.values() if objective.captions_from]
        self.caption_field = asked[0] if asked else "caption_ids"
        extra = frozenset().union(*(objective.text_fields for objective in objectives.values()))
        self.text_fields = [self.caption_field, *sorted(extra - {self.caption_field})]
        self.full_text = encoder.full_text or any(objective.full_text for objective in objectives.values())
        self._needed_by = dict.fromkeys(["images", "pids", *self.text_fields, *encoder.inputs], "model")
        self._needed_by |= {} if teacher is None else dict.fromkeys(teacher.inputs, "teacher")
        for name, objective in objectives.items():
            self._needed_by |= dict.fromkeys(objective.inputs | objective.text_fields, f"losses.{name}")

    @property
    def teacher(self) -> AnyTeacher | None:
        return self._teacher[0]

    @property
    def inputs(self) -> frozenset[str]:
        """Required batch fields."""
        return frozenset(self._needed_by)

    def named_objectives(self) -> Iterator[tuple[str, Objective]]:
        """Typed view of `objectives`."""
        return ((name, module) for name, module in self.objectives.items() if isinstance(module, Objective))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RetrievalTask":
        if self.teacher is not None:
            self.teacher._apply(fn)  # type: ignore[no-untyped-call]  # moves to another device with the task
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def forward(self, batch: Batch, shard: Shard | None = None) -> tuple[Tensor, Metrics]:
        """The weighted sum of the losses, and metrics for the log: `<name>_loss` (unweighted), accuracies.

        Args:
            batch: the fields that `inputs` names, for the micro-batch of this process.
            shard: how the micro-batch relates to those of other processes; None compares its rows alone.
        """
        weights = None if shard is None else self.token_weights([MicroBatch(batch, shard)])[0]
        return self.losses(self.gathered_step(batch, shard), weights=weights or {})

    def gathered_step(self, batch: Batch, shard: Shard | None = None) -> Step:
        """Encode a micro-batch and gather its rows over processes; arguments as in `forward`."""
        rows, tokens = self.encode(batch)
        return self.step(rows if shard is None else shard.gather(rows), batch, tokens)

    def encode(self, batch: Batch) -> tuple[dict[str, Tensor], Tokens]:
        """Run each tower once; several kinds of captions go through the text tower as one batch.

        Returns:
            Rows (b, ...) to gather: embeddings, those of the teacher, and `ROW_FIELDS`; and the tokens, which stay.

        Raises:
            ValueError: the batch lacks a field; names the loss that needs it.
        """
        self._check_fields(batch)
        image = self.encoder.encode_image(batch["images"])
        both = self.encoder.encode_text(torch.cat([batch[name] for name in self.text_fields]))
        size = len(batch["images"])
        tokens = Tokens(
            image.tokens, dict(zip(self.text_fields, both.tokens.split(size), strict=True)), self.caption_field
        )
        text = Encoded(both.embedding[:size], both.tokens[:size], tuple(more[:size] for more in both.more))
        image, text = self.encoder.enrich(image, text, batch)
        rows = {f"image.{number}": embedding for number, embedding in enumerate(image.embeddings)}
        rows |= {f"text.{number}": embedding for number, embedding in enumerate(text.embeddings)}
        rows |= {name: batch[name] for name in ROW_FIELDS if name in batch}
        if self.teacher is not None:
            rows["teacher.image"], rows["teacher.text"] = self.teacher(batch)
        return rows, tokens

    def step(self, rows: Mapping[str, Tensor], batch: Batch | None = None, tokens: Tokens | None = None) -> Step:
        """The step that objectives see.

        Args:
            rows: rows of `encode`, gathered or not.
            batch: other fields of the micro-batch.
            tokens: tokens of the micro-batch; None where several micro-batches are gathered.
        """
        image, text = ([rows[name] for name in rows if name.startswith(side)] for side in EMBEDDINGS)
        fields = {name: rows[name] for name in ROW_FIELDS if name in rows}
        pairs = [*zip(image, text, strict=True), *self.encoder.relate(image[0], text[0], fields)]
        embeddings = tuple((precise(image), precise(text)) for image, text in pairs)
        teacher = None
        if self.encoder.teaches_itself:
            teacher = (embeddings[-1][0].detach(), embeddings[-1][1].detach())
        elif "teacher.image" in rows:
            teacher = (rows["teacher.image"], rows["teacher.text"])
        return Step(
            embeddings=embeddings,
            pids=rows["pids"],
            logit_scale=self.encoder.logit_scale,
            tokens=tokens,
            teacher=teacher,
            batch=(batch or {}) | fields,
        )

    def losses(
        self, step: Step, *, tokens: bool | None = None, weights: Mapping[str, Tensor] = MappingProxyType({})
    ) -> tuple[Tensor, Metrics]:
        """Evaluate the objectives; returns the same as `forward`.

        Args:
            step: inputs of the objectives.
            tokens: True for objectives that read tokens only, False for the others, None for all.
            weights: name -> weight of the micro-batch in the mean of an objective that reads tokens.
        """
        total = step.image.new_zeros(())
        metrics: Metrics = {}
        for name, objective in self.named_objectives():
            if tokens is not None and objective.reads_tokens is not tokens:
                continue
            device = step.image.device.type
            precision = objective.autocast and torch.is_autocast_enabled(device)
            trained = objective.weight != 0  # otherwise computed and logged only, and a NaN does no harm
            products = torch.get_float32_matmul_precision() if objective.autocast else "highest"
            with torch.autocast(device, enabled=precision), torch.set_grad_enabled(trained), matmul_precision(products):
                loss, found = objective(step)
            if (weight := weights.get(name)) is not None:
                loss = loss * weight.to(loss.dtype)
                found = {k: v if isinstance(v, MaskedMean) else v * weight.to(v.dtype) for k, v in found.items()}
            if trained:
                total = total + objective.weight * loss
            metrics[f"{name}_loss"] = loss.detach()
            metrics |= {
                f"{name}_{key}" if isinstance(value, MaskedMean) else key: value for key, value in found.items()
            }
        return total, metrics

    def token_weights(self, micro_batches: Sequence[MicroBatch]) -> list[dict[str, Tensor]]:
        """Per-micro-batch weights of the token-level objectives, name -> scalar; see `micro_batch_weights`."""
        readers = [(name, objective) for name, objective in self.named_objectives() if objective.reads_tokens]
        if not readers or (len(micro_batches) == 1 and world_size() == 1):
            return [{} for _ in micro_batches]
        counts = [
            [objective.count(fields) if shard.num_local_rows else 0 for _, objective in readers]
            for fields, shard in micro_batches
        ]
        weights = micro_batch_weights(send(torch.tensor(counts), micro_batches[0].fields["pids"].device))
        return [{name: weight for (name, _), weight in zip(readers, row, strict=True)} for row in weights]

    def encode_image(self, images: Tensor) -> Encoded:
        return self.encoder.encode_image(images)

    def encode_text(self, caption_ids: Tensor) -> Encoded:
        return self.encoder.encode_text(caption_ids)

    def _check_fields(self, batch: Batch) -> None:
        for name, key in self._needed_by.items():
            if name not in batch:
                what = f"'{name}' ({FIELDS[name]})" if name in FIELDS else f"'{name}'"
                raise ValueError(f"{key}: needs the batch field {what}, got {', '.join(batch)}; request task.inputs")
