"""Losses and their parameters. Importing this package registers all of them."""

from model.objectives.base import OBJECTIVES, EpochContext, MaskedMean, Metadata, Metrics, Objective, Step, Tokens
from model.objectives.pair import PairObjective
from utils.registry import import_modules

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

import_modules(__name__)
