"""Identity classification: one classifier over the training identities, shared by both modalities."""

import torch.nn.functional as F
from torch import Tensor, nn

from model.objectives.base import OBJECTIVES, Metadata, Metrics, Objective, Step, Weight


def id_loss(image_logits: Tensor, text_logits: Tensor, pids: Tensor) -> Tensor:
    """Mean of the cross entropies of both modalities (anosorae/IRRA@cfc2378:model/objectives.py:compute_id).

    The instance loss of Zheng et al., TOMM 2020 (https://arxiv.org/abs/1711.05535).

    Args:
        image_logits: (B, C).
        text_logits: (B, C).
        pids: int64 (B,), labels 0..C-1.
    """
    return (F.cross_entropy(image_logits, pids) + F.cross_entropy(text_logits, pids)) / 2


@OBJECTIVES.register("id")
class Identity(Objective):
    """Identity classification, see `id_loss`; logs the accuracies `img_acc` and `txt_acc` in [0, 1].

    Args:
        weight: weight of the loss; 0 only logs it.
    """

    def __init__(self, metadata: Metadata, *, weight: Weight = 1.0) -> None:
        super().__init__(weight=weight)
        self.classifier = nn.Linear(metadata.embed_dim, metadata.num_pids)
        nn.init.normal_(self.classifier.weight, std=0.001)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, step: Step) -> tuple[Tensor, Metrics]:
        image, text = self.classifier(step.image), self.classifier(step.text)
        accuracy: Metrics = {
            name: (logits.detach().argmax(dim=1) == step.pids).float().mean()
            for name, logits in {"img_acc": image, "txt_acc": text}.items()
        }
        return id_loss(image, text, step.pids), accuracy
