"""Losses that pull a student's embeddings towards those of a frozen teacher with more views of each person."""

import torch.nn.functional as F
from torch import Tensor

from model.objectives.base import OBJECTIVES, Metadata, Metrics, Objective, Step, Weight
from utils.errors import ConfigError


def feature_loss(
    student_image: Tensor, student_text: Tensor, teacher_image: Tensor, teacher_text: Tensor, *, normalize: bool = True
) -> Tensor:
    """Squared distance of each embedding to the teacher's (docs/methods/lcr2s.md#distill_features).

    Args:
        student_image: (B, D).
        student_text: (B, D).
        teacher_image: (B, D), without gradient.
        teacher_text: (B, D), without gradient.
        normalize: distances of unit vectors, mean over the batch and both modalities. This is 2 minus the mean cosines
            of both. False: distances of the vectors, mean over batch, dimensions and modalities.
    """
    sides = ((student_image, teacher_image.detach()), (student_text, teacher_text.detach()))
    if normalize:
        distances = [(F.normalize(student) - F.normalize(teacher)).square().sum(dim=1) for student, teacher in sides]
    else:
        distances = [(student - teacher).square() for student, teacher in sides]
    return (distances[0].mean() + distances[1].mean()) / 2


def relation_loss(student_image: Tensor, student_text: Tensor, teacher_image: Tensor, teacher_text: Tensor) -> Tensor:
    """Mean squared difference of the image-text cosines to the teacher's (docs/methods/lcr2s.md#distill_relations).

    Args:
        student_image: (B, D).
        student_text: (B, D).
        teacher_image: (B, D'), without gradient.
        teacher_text: (B, D'), without gradient.
    """
    similarity = F.normalize(student_image) @ F.normalize(student_text).T
    target = F.normalize(teacher_image.detach()) @ F.normalize(teacher_text.detach()).T
    return F.mse_loss(similarity, target)


@OBJECTIVES.register("distill_features")
class DistillFeatures(Objective):
    """Distillation of embeddings, see `feature_loss`.

    Args:
        weight: weight of the loss; 0 only logs it.
        normalize: distances of unit vectors.
    """

    needs_teacher = True

    def __init__(self, metadata: Metadata, *, weight: Weight = 1.0, normalize: bool = True) -> None:
        super().__init__(weight=weight)
        self.normalize = normalize

    def forward(self, step: Step) -> tuple[Tensor, Metrics]:
        assert step.teacher is not None
        student, teacher = step.image.shape[1], step.teacher[0].shape[1]
        if student != teacher:
            raise ConfigError(
                f"losses.distill_features: needs a teacher with the student's {student} dimensions, got {teacher}; use "
                "losses.distill_relations, which compares similarities"
            )
        return feature_loss(step.image, step.text, *step.teacher, normalize=self.normalize), {}


@OBJECTIVES.register("distill_relations")
class DistillRelations(Objective):
    """Distillation of the batch's image-text similarities, see `relation_loss`.

    Args:
        weight: weight of the loss; 10 brings it to the magnitude of `distill_features`.
    """

    needs_teacher = True

    def __init__(self, metadata: Metadata, *, weight: Weight = 10.0) -> None:
        super().__init__(weight=weight)

    def forward(self, step: Step) -> tuple[Tensor, Metrics]:
        assert step.teacher is not None
        return relation_loss(step.image, step.text, *step.teacher), {}
