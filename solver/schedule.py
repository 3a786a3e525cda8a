"""Learning rate over epochs, as a pure function."""

import bisect
import math
from collections.abc import Sequence


def lr_at(
    epoch: int,
    base_lr: float,
    *,
    name: str,
    epochs: int,
    warmup_epochs: int = 0,
    warmup_factor: float = 0.1,
    warmup: str = "linear",
    warmup_lr: float = 0.0,
    min_lr: float = 0.0,
    milestones: Sequence[int] = (20, 50),
    gamma: float = 0.1,
    power: float = 0.9,
) -> float:
    """The learning rate of an epoch (IRRA solver/lr_scheduler.py:LRSchedulerWithWarmup, spec 1.7).

    The rate is constant within an epoch. `poly` and `exp` keep the published formulas, odd as they are: `poly` rises
    from power * base to base, `exp` falls from base to power * base (quirk Q19). `timm_cosine` is the cosine of
    timm's scheduler: its phase is counted from the run's start, also where warm-up takes the first epochs, and warm-up
    begins at an absolute rate (IVT solver/scheduler_factory.py; spec 6).

    Args:
        epoch: from 1 to `epochs`, as logs count.
        base_lr: the rate at the end of warm-up, of the solver or of one parameter group.
        name: cosine, timm_cosine, step, linear, exp, poly or constant.
        epochs: the run's length, warm-up included.
        warmup_epochs: epochs before the schedule proper.
        warmup_factor: the first epoch's rate, as a part of base_lr.
        warmup: linear, or constant at base_lr * warmup_factor.
        warmup_lr: timm_cosine: the rate that warm-up rises from, epoch 0's.
        min_lr: what the cosines end at; poly moves between it and base_lr.
        milestones: step: epochs completed when the rate drops.
        gamma: step: factor of each drop.
        power: exp, poly: base of the power.
    """
    if name == "timm_cosine":
        if epoch < warmup_epochs:
            return warmup_lr + epoch * (base_lr - warmup_lr) / warmup_epochs
        return min_lr + (base_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(epoch / epochs, 1)))
    done = epoch - 1
    if done < warmup_epochs:
        progress = done / warmup_epochs if warmup == "linear" else 0.0
        return base_lr * (warmup_factor * (1 - progress) + progress)
    progress = (done - warmup_epochs) / (epochs - warmup_epochs)
    if name == "cosine":
        return min_lr + (base_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    if name == "step":
        return base_lr * gamma ** bisect.bisect_right(sorted(milestones), done)
    if name == "linear":
        return base_lr * (1 - progress)
    if name == "exp":
        return base_lr * power**progress
    if name == "poly":
        return min_lr + (base_lr - min_lr) * power ** (1 - progress)
    if name == "constant":
        return base_lr
    raise ValueError(f"unknown schedule '{name}'")
