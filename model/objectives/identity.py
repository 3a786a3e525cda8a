"""Identity classification: one classifier over the training identities, shared by both modalities."""

import torch.nn.functional as F
from torch import Tensor, nn

from model.objectives.base import OBJECTIVES, Facts, Objective, Step, Values


def id_loss(image_logits: Tensor, text_logits: Tensor, pids: Tensor) -> Tensor:
    """Mean of both modalities' cross entropies (Zheng et al., TOMM 2020; IRRA model/objectives.py:compute_id).

    Args:
        image_logits, text_logits: (B, C).
        pids: int64 (B,), labels 0..C-1.
    """
    return (F.cross_entropy(image_logits, pids) + F.cross_entropy(text_logits, pids)) / 2


@OBJECTIVES.register("id")
class Identity(Objective):
    """See `id_loss`. The log also gets each modality's accuracy on the batch, `img_acc` and `txt_acc` in [0, 1]."""

    def __init__(self, facts: Facts, *, weight: float = 1.0) -> None:
        super().__init__(weight=weight)
        self.classifier = nn.Linear(facts.embed_dim, facts.num_pids)
        nn.init.normal_(self.classifier.weight, std=0.001)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, step: Step) -> tuple[Tensor, Values]:
        image, text = self.classifier(step.image), self.classifier(step.text)
        accuracy = {
            name: (logits.detach().argmax(dim=1) == step.pids).float().mean()
            for name, logits in {"img_acc": image, "txt_acc": text}.items()
        }
        return id_loss(image, text, step.pids), accuracy
