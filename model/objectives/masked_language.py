"""Implicit relation reasoning: predict masked caption tokens with the help of the image."""

from typing import Annotated

import torch.nn.functional as F
from timm.layers import QuickGELU
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from model.encoders.mlp import lean_mlps
from model.objectives.base import OBJECTIVES, Metadata, Metrics, Objective, Step, Weight
from utils.batch import Batch
from utils.errors import ConfigError
from utils.options import Option
from utils.precision import precise

HEAD_DIM = 64  # dimensions of an attention head, as in all CLIP models


def mlm_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of the tokens with a label (anosorae/IRRA@cfc2378:model/objectives.py:compute_mlm).

    Args:
        scores: (M, V).
        labels: int64 (M,); 0 = ignored.
    """
    return F.cross_entropy(scores, labels, ignore_index=0)


@OBJECTIVES.register("mlm")
class MaskedLanguage(Objective):
    """Implicit relation reasoning of IRRA (Jiang & Ye, CVPR 2023, https://arxiv.org/abs/2303.12501, section 3.2).

    Masked text tokens attend once to all image tokens and pass `depth` transformer blocks. A head scores the vocabulary
    at the labelled positions (anosorae/IRRA@cfc2378:model/build.py:IRRA). The log gets the accuracy `mlm_acc`.

    Args:
        weight: weight of the loss; 0 only logs it.
        depth: transformer blocks behind the cross attention.
        clean_captions: give the other losses unmasked captions, as in the paper. The published code gives them masked
            ones, and its numbers depend on that (docs/methods/irra.md#masked-captions).
    """

    inputs = frozenset({"mlm_labels", "mlm_positions"})
    text_fields = frozenset({"mlm_ids"})
    reads_tokens = True
    autocast = True
    full_text = True  # the blocks attend to padding, so predictions depend on its length

    def __init__(
        self,
        metadata: Metadata,
        *,
        weight: Weight = 1.0,
        depth: Annotated[int, Option(ge=0, le=1000)] = 4,
        clean_captions: bool = False,
    ) -> None:
        super().__init__(weight=weight)
        width, heads = metadata.embed_dim, metadata.embed_dim // HEAD_DIM
        if width % HEAD_DIM:
            raise ConfigError(f"losses.mlm: needs model.embed_dim to be a multiple of {HEAD_DIM}, got {width}")
        self.captions_from = None if clean_captions else "mlm_ids"
        self.ln_pre_text, self.ln_pre_image, self.ln_post = (nn.LayerNorm(width) for _ in range(3))
        self.cross_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.cross_transformer = nn.Sequential(
            *(Block(width, heads, qkv_bias=True, norm_layer=nn.LayerNorm, act_layer=QuickGELU) for _ in range(depth))
        )
        lean_mlps(self.cross_transformer)
        self.mlm_head = nn.Sequential()
        self.mlm_head.add_module("dense", nn.Linear(width, width))
        self.mlm_head.add_module("gelu", QuickGELU())
        self.mlm_head.add_module("ln", nn.LayerNorm(width))
        self.mlm_head.add_module("fc", nn.Linear(width, metadata.vocab_size))
        self._init_weights(width, depth)

    def forward(self, step: Step) -> tuple[Tensor, Metrics]:
        positions = step.batch["mlm_positions"]
        labels = step.batch["mlm_labels"].flatten()[positions]
        hidden = self.fuse(step.texts["mlm_ids"], step.image_tokens)
        scores = self.mlm_head(hidden.flatten(0, 1)[positions])  # (M, V)
        accuracy = (scores.detach().argmax(dim=1) == labels).float().mean()
        return mlm_loss(precise(scores), labels), {"mlm_acc": accuracy}

    def count(self, batch: Batch) -> int:
        return len(batch["mlm_positions"])

    def fuse(self, text_tokens: Tensor, image_tokens: Tensor) -> Tensor:
        """Fuse (B, L, D) with (B, 1 + N, D) -> (B, L, D), without residual around the cross attention and mask."""
        keys = self.ln_pre_image(image_tokens)
        fused, _ = self.cross_attn(self.ln_pre_text(text_tokens), keys, keys, need_weights=False)
        hidden: Tensor = self.ln_post(self.cross_transformer(fused))
        return hidden

    def _init_weights(self, width: int, depth: int) -> None:
        """CLIP's scheme: layers at the end of a residual branch shrink with depth (docs/methods/irra.md#model).

        Other biases keep PyTorch's initialisation.
        """
        attention, hidden = width**-0.5, (2 * width) ** -0.5
        ending = attention * (2 * max(depth, 1)) ** -0.5
        deviations = {
            ("in_proj_weight", "attn.qkv.weight"): attention,
            ("fc1.weight", "mlm_head.dense.weight"): hidden,
            ("out_proj.weight", "attn.proj.weight", "fc2.weight", "mlm_head.fc.weight"): ending,
            ("attn.qkv.bias", "attn.proj.bias"): 0.0,
        }
        for name, parameter in self.named_parameters():
            for endings, deviation in deviations.items():
                if name.endswith(endings):
                    nn.init.normal_(parameter, std=deviation)
