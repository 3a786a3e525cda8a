"""Losses and the parts that only they need. Importing this package registers them all."""

from model.objectives import distillation, fine_grained, identity, masked_language, matching, ranking  # noqa: F401
from model.objectives.base import OBJECTIVES, Facts, Objective, PartMean, Step, Values
from model.objectives.pair import PairObjective

__all__ = ["OBJECTIVES", "Facts", "Objective", "PairObjective", "PartMean", "Step", "Values"]
