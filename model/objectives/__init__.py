"""Losses and their parameters. Importing this package registers all of them."""

from model.objectives import distillation, fine_grained, identity, masked_language, matching, ranking  # noqa: F401
from model.objectives.base import OBJECTIVES, EpochContext, MaskedMean, Metadata, Metrics, Objective, Step, Tokens
from model.objectives.pair import PairObjective

__all__ = [
    "OBJECTIVES",
    "EpochContext",
    "MaskedMean",
    "Metadata",
    "Metrics",
    "Objective",
    "PairObjective",
    "Step",
    "Tokens",
]
