"""Losses and the parts that only they need. Importing this package registers them all."""

from model.objectives import fine_grained, identity, masked_language, matching  # noqa: F401
from model.objectives.base import OBJECTIVES, Facts, Objective, Step

__all__ = ["OBJECTIVES", "Facts", "Objective", "Step"]
