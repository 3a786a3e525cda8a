"""Checkpoint formats of the field, with rules to map the names of their tensors to ours."""

import re
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from utils.registry import Registry

Rules = tuple[tuple[str, str], ...]  # (pattern, replacement), applied in order to each name

# Both towers of OpenAI's CLIP. open_clip uses the same names.
OPENAI_RULES: Rules = (
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
# IRRA: OpenAI's names behind "base_model.", and the heads (docs/methods/irra.md#checkpoints).
IRRA_RULES: Rules = (
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
# RDE: IRRA's names, and the layers of token selection. Tensors that its code never uses (the visual `linear` and both
# `mlp.bns.1`) are reported as unexpected (docs/methods/rde.md#checkpoints).
RDE_RULES: Rules = (
    (r"^visul_emb_layer\.fc\.", "encoder.selection.image.skip."),
    (r"^visul_emb_layer\.mlp\.layers\.0\.", "encoder.selection.image.hidden."),
    (r"^visul_emb_layer\.mlp\.layers\.1\.", "encoder.selection.image.out."),
    (r"^visul_emb_layer\.mlp\.bns\.0\.", "encoder.selection.image.norm."),
    (r"^texual_emb_layer\.linear\.", "encoder.selection.text.skip."),
    (r"^texual_emb_layer\.mlp\.layers\.0\.", "encoder.selection.text.hidden."),
    (r"^texual_emb_layer\.mlp\.layers\.1\.", "encoder.selection.text.out."),
    (r"^texual_emb_layer\.mlp\.bns\.0\.", "encoder.selection.text.norm."),
    *IRRA_RULES,
)
# Tensors inside a timm block, in any tower.
BLOCK_RULES: Rules = (
    (r"((?:trunk\.blocks|cross_transformer)\.\d+)\.attn\.in_proj_", r"\1.attn.qkv."),
    (r"((?:trunk\.blocks|cross_transformer)\.\d+)\.attn\.out_proj\.", r"\1.attn.proj."),
    (r"((?:trunk\.blocks|cross_transformer)\.\d+)\.ln_(\d)\.", r"\1.norm\2."),
    (r"((?:trunk\.blocks|cross_transformer)\.\d+)\.mlp\.c_fc\.", r"\1.mlp.fc1."),
    (r"((?:trunk\.blocks|cross_transformer)\.\d+)\.mlp\.c_proj\.", r"\1.mlp.fc2."),
)
HUGGING_FACE_RULES: Rules = (
    (r"^vision_model\.embeddings\.class_embedding$", "encoder.image.trunk.cls_token"),
    (r"^vision_model\.embeddings\.position_embedding\.weight$", "encoder.image.trunk.pos_embed"),
    (r"^vision_model\.embeddings\.patch_embedding\.", "encoder.image.trunk.patch_embed.proj."),
    (r"^vision_model\.pre_layrnorm\.", "encoder.image.trunk.norm_pre."),  # their spelling
    (r"^vision_model\.post_layernorm\.", "encoder.image.trunk.norm."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.layer_norm(\d)\.", r"encoder.image.trunk.blocks.\1.norm\2."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.out_proj\.", r"encoder.image.trunk.blocks.\1.attn.proj."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.self_attn\.", r"encoder.image.trunk.blocks.\1.attn."),
    (r"^vision_model\.encoder\.layers\.(\d+)\.mlp\.", r"encoder.image.trunk.blocks.\1.mlp."),
    (r"^visual_projection\.", "encoder.image.projection."),
    (r"^text_model\.", "encoder.text.trunk."),
    (r"^text_projection\.", "encoder.text.projection."),
)
# IVT's encoder (docs/methods/ivt.md#checkpoints). Other tensors are reported as unexpected: `temp`, `bottleneck_img`
# and `classifier_img`, which its code never reads, and `encoder_fusion` and `itm` of pre-training.
IVT_RULES: Rules = (
    (r"^encoder_vl\.type_embed$", "encoder.type_embed"),
    (r"^encoder_vl\.embeddings\.", "encoder.words."),
    (r"^encoder_vl\.(blocks\.\d+)\.mlp_vis\.", r"encoder.trunk.\1.mlp."),
    (r"^encoder_vl\.(blocks\.\d+)\.mlp_txt\.", r"encoder.trunk.\1.text_mlp."),
    (r"^encoder_vl\.", "encoder.trunk."),
)
# Tensors that are no weights: OpenAI's constants and causal mask, Hugging Face's position ids, the temperature.
NO_WEIGHTS = re.compile(
    r"^(logit_scale|logit_bias|input_resolution|context_length|vocab_size)$|(^|\.)(attn_mask|position_ids)$"
)
RESNET = re.compile(r"(^|\.)layer[1-4]\.\d+\.(conv|bn)\d\.")  # tensors of ResNet towers, which no encoder has
# A file has the first format whose mark matches one of its names.
MARKS: tuple[tuple[str, str], ...] = (
    ("own", r"^encoder\."),
    ("rde", r"^(visul|texual)_emb_layer\."),
    ("irra", r"^base_model\.visual\.class_embedding$"),
    ("openai", r"^visual\.class_embedding$"),
    ("huggingface", r"^vision_model\."),
    ("ivt", r"^encoder_vl\."),
)
FORMATS: Registry[Callable[[Mapping[str, Tensor]], dict[str, Tensor]]] = Registry("checkpoint format")


def recognise(names: Iterable[str]) -> str | None:
    """The format of a checkpoint with these tensor names; None if it is unknown."""
    names = list(names)
    return next((format for format, mark in MARKS if any(re.search(mark, name) for name in names)), None)


def renamed(name: str, rules: Rules) -> list[str]:
    """Our name of a foreign tensor; three names if it holds query, key and value."""
    for pattern, replacement in (*rules, *BLOCK_RULES):
        name = re.sub(pattern, replacement, name)
    return [name.replace("qkv_proj", f"{part}_proj") for part in "qkv"] if ".qkv_proj." in name else [name]


@FORMATS.register("own")
def own(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Checkpoints of train.py."""
    return dict(state)


@FORMATS.register("openai")
def openai(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenAI's CLIP, and open_clip's of the same architecture, without heads."""
    return _projections_turned(_convert(state, OPENAI_RULES))


@FORMATS.register("ham")  # Jiang et al., CVPR 2025: IRRA's encoder without heads
@FORMATS.register("mllm4text")  # Tan et al., CVPR 2024: IRRA's encoder without heads
@FORMATS.register("fmfa")  # both versions; the classifier of the second has one row per training caption
@FORMATS.register("irra")
def irra(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """IRRA, and its descendants with the same names."""
    return _projections_turned(_convert(state, IRRA_RULES))


@FORMATS.register("rde")
def rde(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """RDE: IRRA's encoder without heads, and token selection."""
    return _projections_turned(_convert(state, RDE_RULES))


@FORMATS.register("huggingface")
def huggingface(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' CLIPModel. Its vision tower separates query, key and value; timm holds them in one tensor."""
    converted = _convert(state, HUGGING_FACE_RULES)
    for query in [name for name in converted if re.search(r"\.attn\.q_proj\.", name)]:
        parts = [query.replace(".q_proj.", f".{part}_proj.") for part in "qkv"]
        if all(part in converted for part in parts):
            converted[query.replace(".q_proj.", ".qkv.")] = torch.cat([converted.pop(part) for part in parts])
    return converted


@FORMATS.register("ivt")
def ivt(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """IVT's checkpoints of pre-training and fine-tuning."""
    return _convert(state, IVT_RULES)


def _projections_turned(converted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Transpose the projections: OpenAI multiplies by them from the right, a linear layer by the transpose."""
    for name in ("encoder.image.projection.weight", "encoder.text.projection.weight"):
        if name in converted:
            converted[name] = converted[name].t().contiguous()
    return converted


def _convert(state: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    converted = {}
    for name, value in state.items():
        if NO_WEIGHTS.search(name):
            continue
        names = renamed(name, rules)
        for ours, part in zip(names, value.chunk(len(names)) if len(names) > 1 else [value], strict=True):
            if ours.endswith((".cls_token", ".pos_embed")):
                part = part.reshape(1, -1, part.shape[-1])
            converted[ours] = part
    return converted
