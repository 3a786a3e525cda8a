"""Seeding of the global random number generators, and their state."""

import random

import numpy as np
import torch
from torch import Tensor

from utils.distributed import rank


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (CPU and GPUs)."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def seed_process(seed: int) -> None:
    """Re-seed per process once the weights are initialised, so that dropout and masks differ between processes."""
    if rank():
        torch.manual_seed(seed * 1_000_003 + rank())


def random_state(device: torch.device) -> dict[str, Tensor]:
    """State of torch's generators, which dropout and masking in the model draw from; data loading does not."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Restore a state of `random_state`; the state of another kind of device is ignored."""
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"], device)
