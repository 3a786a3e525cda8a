"""One seed for every global random number generator."""

import random

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (CPU and GPUs)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
