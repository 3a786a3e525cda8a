"""Implicit relation reasoning: masked caption tokens are predicted with the help of the image."""

import torch.nn.functional as F
from timm.layers import QuickGELU
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from model.objectives.base import OBJECTIVES, Facts, Objective, Step, Values
from utils.batch import Batch
from utils.errors import ConfigError
from utils.precision import precise

HEAD_DIM = 64  # of each attention head, as everywhere in CLIP


def mlm_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over the tokens whose label is not 0 (IRRA model/objectives.py:compute_mlm).

    Args:
        scores: (M, V).
        labels: int64 (M,); 0 = ignored.
    """
    return F.cross_entropy(scores, labels, ignore_index=0)


@OBJECTIVES.register("mlm")
class MaskedLanguage(Objective):
    """Jiang & Ye, CVPR 2023, section 3.2 (IRRA model/build.py:IRRA, cross_former and mlm_head).

    Masked text tokens attend once to all image tokens, pass `depth` transformer blocks, and a head scores the
    vocabulary. The head runs on the labelled positions only. The log also gets `mlm_acc` in [0, 1].

    Args:
        facts: sizes.
        weight: of the loss.
        depth: transformer blocks behind the cross attention.
        clean_captions: give the other losses the unmasked captions, as the paper has it. The published code gives
            them the masked ones (spec 1.5, quirk Q1), and its numbers depend on that.
    """

    inputs = frozenset({"mlm_labels", "mlm_positions"})
    text_fields = frozenset({"mlm_ids"})
    reads_tokens = True
    autocast = True
    full_text = True  # the blocks attend to padding, too: the prediction depends on how much of it there is

    def __init__(self, facts: Facts, *, weight: float = 1.0, depth: int = 4, clean_captions: bool = False) -> None:
        super().__init__(weight=weight)
        if facts.embed_dim % HEAD_DIM:
            raise ConfigError(f"losses.mlm: needs model.embed_dim to be a multiple of {HEAD_DIM}, is {facts.embed_dim}")
        if depth < 0:
            raise ConfigError(f"losses.mlm.depth: must not be negative, is {depth}")
        width, heads = facts.embed_dim, facts.embed_dim // HEAD_DIM
        self.captions_from = None if clean_captions else "mlm_ids"
        self.ln_pre_text, self.ln_pre_image, self.ln_post = (nn.LayerNorm(width) for _ in range(3))
        self.cross_attn = nn.MultiheadAttention(width, heads, batch_first=True)
        self.cross_transformer = nn.Sequential(
            *(Block(width, heads, qkv_bias=True, norm_layer=nn.LayerNorm, act_layer=QuickGELU) for _ in range(depth))
        )
        self.mlm_head = nn.Sequential()
        self.mlm_head.add_module("dense", nn.Linear(width, width))
        self.mlm_head.add_module("gelu", QuickGELU())
        self.mlm_head.add_module("ln", nn.LayerNorm(width))
        self.mlm_head.add_module("fc", nn.Linear(width, facts.vocab_size))
        self._init_weights(width, depth)

    def forward(self, step: Step) -> tuple[Tensor, Values]:
        positions = step.batch["mlm_positions"]
        labels = step.batch["mlm_labels"].flatten()[positions]
        hidden = self.fuse(step.texts["mlm_ids"], step.image_tokens)
        scores = self.mlm_head(hidden.flatten(0, 1)[positions])  # (M, V)
        accuracy = (scores.detach().argmax(dim=1) == labels).float().mean()
        return mlm_loss(precise(scores), labels), {"mlm_acc": accuracy}

    def count(self, batch: Batch) -> int:
        return len(batch["mlm_positions"])

    def fuse(self, text_tokens: Tensor, image_tokens: Tensor) -> Tensor:
        """(B, L, D) and (B, 1 + N, D) -> (B, L, D). No residual around the cross attention, no mask in the blocks."""
        keys = self.ln_pre_image(image_tokens)
        fused, _ = self.cross_attn(self.ln_pre_text(text_tokens), keys, keys, need_weights=False)
        return self.ln_post(self.cross_transformer(fused))

    def _init_weights(self, width: int, depth: int) -> None:
        """Spec 1.2: CLIP's scheme (what ends a residual branch shrinks with depth); other biases are PyTorch's."""
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
