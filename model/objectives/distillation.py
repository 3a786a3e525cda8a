"""Losses that pull a student's embeddings towards those of a frozen teacher, which sees more of each person."""

import torch.nn.functional as F
from torch import Tensor

from model.objectives.base import OBJECTIVES, Facts, Objective, Step, Values
from utils.errors import ConfigError


def feature_loss(
    student_image: Tensor, student_text: Tensor, teacher_image: Tensor, teacher_text: Tensor, *, normalize: bool = True
) -> Tensor:
    """Squared distance of each embedding to the teacher's (LCR2S spec 6.3: the kind is the paper's, the scale ours).

    Args:
        student_image, student_text: (B, D).
        teacher_image, teacher_text: (B, D); they get no gradient.
        normalize: of unit vectors, mean over the batch and both modalities, which is 2 minus the mean cosines of both;
            False: of the vectors themselves, mean over batch, dimensions and modalities.
    """
    sides = ((student_image, teacher_image.detach()), (student_text, teacher_text.detach()))
    if normalize:
        distances = [(F.normalize(student) - F.normalize(teacher)).square().sum(dim=1) for student, teacher in sides]
    else:
        distances = [(student - teacher).square() for student, teacher in sides]
    return (distances[0].mean() + distances[1].mean()) / 2


def relation_loss(student_image: Tensor, student_text: Tensor, teacher_image: Tensor, teacher_text: Tensor) -> Tensor:
    """Mean squared difference of the batch's image-text cosine similarities to the teacher's (LCR2S spec 6.3).

    Args:
        student_image, student_text: (B, D).
        teacher_image, teacher_text: (B, D'); they get no gradient.
    """
    similarity = F.normalize(student_image) @ F.normalize(student_text).T
    target = F.normalize(teacher_image.detach()) @ F.normalize(teacher_text.detach()).T
    return F.mse_loss(similarity, target)


@OBJECTIVES.register("distill_features")
class DistillFeatures(Objective):
    """See `feature_loss`."""

    needs_teacher = True

    def __init__(self, facts: Facts, *, weight: float = 1.0, normalize: bool = True) -> None:
        super().__init__(weight=weight)
        self.normalize = normalize

    def forward(self, step: Step) -> tuple[Tensor, Values]:
        assert step.teacher is not None
        ours, theirs = step.image.shape[1], step.teacher[0].shape[1]
        if ours != theirs:
            raise ConfigError(
                f"losses.distill_features: the teacher's embeddings have {theirs} dimensions, the student's {ours}; "
                "losses.distill_relations compares similarities, of any dimensions"
            )
        return feature_loss(step.image, step.text, *step.teacher, normalize=self.normalize), {}


@OBJECTIVES.register("distill_relations")
class DistillRelations(Objective):
    """See `relation_loss`; the weight puts it in the order of `distill_features` (LCR2S spec 6.3)."""

    needs_teacher = True

    def __init__(self, facts: Facts, *, weight: float = 10.0) -> None:
        super().__init__(weight=weight)

    def forward(self, step: Step) -> tuple[Tensor, Values]:
        assert step.teacher is not None
        return relation_loss(step.image, step.text, *step.teacher), {}
