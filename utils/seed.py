"""One seed for every global random number generator, and the state of those that training draws from."""

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
    """Where several processes train, let each draw its own masks and dropout from now on; the weights are made."""
    if rank():
        torch.manual_seed(seed * 1_000_003 + rank())


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The state of torch's generators: dropout and masking in the model draw from them, the data never do."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state["device"] = torch.get_device_module(device).get_rng_state(device)
    return state


def set_random_state(state: dict[str, Tensor], device: torch.device) -> None:
    """Go on where `random_state` was taken; a state of another kind of device is left out."""
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu" and "device" in state:
        torch.get_device_module(device).set_rng_state(state["device"], device)
