"""Foreign checkpoints -> ours: ordered key maps per format, and a report of what found its place."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, nn

from model.encoders.clip import resize_position_grid
from utils.checkpoint import load_checkpoint
from utils.errors import CheckpointError
from utils.registry import Registry, did_you_mean

# (pattern, replacement), applied in order to every name. OpenAI's names; IRRA's are these behind "base_model.".
OPENAI_RULES: tuple[tuple[str, str], ...] = (
    (r"^visual\.class_embedding$", "encoder.image.trunk.cls_token"),
    (r"^visual\.positional_embedding$", "encoder.image.trunk.pos_embed"),
    (r"^visual\.proj$", "encoder.image.projection.weight"),
    (r"^visual\.conv1\.", "encoder.image.trunk.patch_embed.proj."),
    (r"^visual\.ln_pre\.", "encoder.image.trunk.norm_pre."),
    (r"^visual\.ln_post\.", "encoder.image.trunk.norm."),
    (r"^visual\.transformer\.resblocks\.(\d+)\.", r"encoder.image.trunk.blocks.\1."),
    (r"^positional_embedding$", "encoder.text.trunk.embeddings.position_embedding.weight"),
    (r"^token_embedding\.", "encoder.text.trunk.embeddings.token_embedding."),
    (r"^text_projection$", "encoder.text.projection.weight"),
    (r"^ln_final\.", "encoder.text.trunk.final_layer_norm."),
    (r"^transformer\.resblocks\.(\d+)\.attn\.in_proj_", r"encoder.text.trunk.encoder.layers.\1.self_attn.qkv_proj."),
    (r"^transformer\.resblocks\.(\d+)\.attn\.out_proj\.", r"encoder.text.trunk.encoder.layers.\1.self_attn.out_proj."),
    (r"^transformer\.resblocks\.(\d+)\.ln_(\d)\.", r"encoder.text.trunk.encoder.layers.\1.layer_norm\2."),
    (r"^transformer\.resblocks\.(\d+)\.mlp\.c_fc\.", r"encoder.text.trunk.encoder.layers.\1.mlp.fc1."),
    (r"^transformer\.resblocks\.(\d+)\.mlp\.c_proj\.", r"encoder.text.trunk.encoder.layers.\1.mlp.fc2."),
)
IRRA_RULES: tuple[tuple[str, str], ...] = (
    (r"^base_model\.", ""),
    *OPENAI_RULES,
    (r"^classifier\.", "objectives.id.classifier."),
    (r"^cross_attn\.", "objectives.mlm.cross_attn."),
    (r"^cross_modal_transformer\.resblocks\.(\d+)\.", r"objectives.mlm.cross_transformer.\1."),
    (r"^ln_pre_t\.", "objectives.mlm.ln_pre_text."),
    (r"^ln_pre_i\.", "objectives.mlm.ln_pre_image."),
    (r"^ln_post\.", "objectives.mlm.ln_post."),
    (r"^mlm_head\.", "objectives.mlm.mlm_head."),
)
# Inside a timm block, whichever tower it stands in.
BLOCK_RULES: tuple[tuple[str, str], ...] = (
    (r"((?:trunk\.blocks|cross_transformer)\.\d+)\.attn\.in_proj_", r"\1.attn.qkv."),
    (r"((?:trunk\.blocks|cross_transformer)\.\d+)\.attn\.out_proj\.", r"\1.attn.proj."),
    (r"((?:trunk\.blocks|cross_transformer)\.\d+)\.ln_(\d)\.", r"\1.norm\2."),
    (r"((?:trunk\.blocks|cross_transformer)\.\d+)\.mlp\.c_fc\.", r"\1.mlp.fc1."),
    (r"((?:trunk\.blocks|cross_transformer)\.\d+)\.mlp\.c_proj\.", r"\1.mlp.fc2."),
)
FORMATS: Registry[Callable[[Mapping[str, Tensor]], dict[str, Tensor]]] = Registry("checkpoint format")
DROPPED = {"logit_scale", "input_resolution", "context_length", "vocab_size"}  # of OpenAI's archives; not weights here


@dataclass
class LoadReport:
    """Names of our tensors, except `unexpected`, which are the file's."""

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    resized: list[str] = field(default_factory=list)


def renamed(name: str, rules: tuple[tuple[str, str], ...]) -> list[str]:
    """Our name of a foreign tensor; three names where it holds query, key and value in one."""
    for pattern, replacement in (*rules, *BLOCK_RULES):
        name = re.sub(pattern, replacement, name)
    return [name.replace("qkv_proj", f"{part}_proj") for part in "qkv"] if ".qkv_proj." in name else [name]


def convert(state: Mapping[str, Tensor], rules: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    """A foreign state dict under our names, in our shapes and in fp32."""
    converted = {}
    for name, value in state.items():
        if name in DROPPED:
            continue
        names = renamed(name, rules)
        for ours, part in zip(names, value.chunk(len(names)) if len(names) > 1 else [value], strict=True):
            converted[ours] = _reshaped(ours, part.float())
    return converted


@FORMATS.register("openai")
def openai(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI CLIP's state dict (encoder only)."""
    return convert(state, OPENAI_RULES)


@FORMATS.register("irra")
def irra(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """IRRA's state dict: OpenAI's names behind `base_model.`, and the heads (spec 1.9)."""
    return convert(state, IRRA_RULES)


def load_weights(task: nn.Module, path: str | Path, *, format: str) -> LoadReport:
    """Load a foreign checkpoint into `task`; heads may be missing, the encoder's weights may not.

    Raises:
        CheckpointError: unreadable, a weight of the encoder is missing, or a tensor is of another shape.
    """
    if format not in FORMATS:
        raise CheckpointError(f"unknown checkpoint format '{format}'; {did_you_mean(format, FORMATS)}")
    content = load_checkpoint(path)
    state = content.get("model", content)
    return load_converted(task, FORMATS.get(format, "format")(state), source=str(path))


def load_converted(task: nn.Module, state: Mapping[str, Tensor], *, source: str) -> LoadReport:
    """Copy a converted state dict into `task`, position grid resized where it must be; errors as `load_weights`."""
    own, report, fitting = task.state_dict(), LoadReport(), {}
    for name, value in state.items():
        if name not in own:
            report.unexpected.append(name)
            continue
        if name == "encoder.image.trunk.pos_embed" and value.shape != own[name].shape:
            value = resize_position_grid(value, task.encoder.image.trunk.patch_embed.grid_size)  # type: ignore[union-attr, arg-type]
            report.resized.append(name)
        if value.shape != own[name].shape:
            raise CheckpointError(f"{source}: {name} is {tuple(value.shape)}, here {tuple(own[name].shape)}")
        fitting[name] = value
        report.loaded.append(name)
    report.missing = sorted(own.keys() - fitting.keys())
    lost = [name for name in report.missing if name.startswith("encoder.")]
    if lost:
        raise CheckpointError(
            f"{source}: has no {', '.join(lost[:3])} ({len(lost)} weights of the encoder are missing)"
        )
    task.load_state_dict(fitting, strict=False)
    return report


def _reshaped(name: str, value: Tensor) -> Tensor:
    if name.endswith((".cls_token", ".pos_embed")):
        return value.reshape(1, -1, value.shape[-1])
    if name in ("encoder.image.projection.weight", "encoder.text.projection.weight"):
        return value.T.contiguous()
    return value
