"""Learning rate over epochs. Schedules are registered functions whose keyword-only arguments YAML may set."""

import bisect
import functools
import math
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, NamedTuple

from configs.schema import SolverConfig
from utils.config import component_options
from utils.errors import ConfigError
from utils.options import Option
from utils.registry import Registry

NotNegative = Annotated[float, Option(ge=0)]
Fraction = Annotated[float, Option(gt=0, le=1)]
Milestones = Annotated[list[int], Option(ge=1)]
MILESTONES = [20, 50]


class Progress(NamedTuple):
    """Position of an epoch in a run."""

    epoch: int  # from 1, as logs count
    epochs: int  # length of the run, warm-up included
    fraction: float  # of the epochs after warm-up: 0 in the first of them


Schedule = Callable[..., float]  # (progress, base_lr, *, options) -> learning rate, constant within an epoch
SCHEDULES: Registry[Schedule] = Registry("schedule", "solver")


def lr_at(epoch: int, base_lr: float, *, name: str, epochs: int, **options: Any) -> float:
    """The learning rate of an epoch.

    Args:
        epoch: epoch, from 1 to `epochs`.
        base_lr: rate at the end of warm-up, of the solver or of one parameter group.
        name: registered schedule.
        epochs: length of the run, warm-up included.
        options: options of the schedule.
    """
    schedule = SCHEDULES.get(name, "solver.schedule.name")
    rate = schedule(Progress(epoch, epochs, (epoch - 1) / epochs), base_lr, **options)
    if not 0 <= rate < math.inf:
        raise ConfigError(f"solver.schedule: {name} must give a rate of at least 0, got {rate} in epoch {epoch}")
    return rate


def schedule_options(schedule: Mapping[str, Any]) -> dict[str, Any]:
    """A config's `solver.schedule` with every option spelt out and checked; raises `ConfigError`."""
    return component_options(SCHEDULES, schedule, "solver.schedule", default="cosine")


def check_rates(solver: SolverConfig) -> None:
    """Raise `ConfigError` if the schedule starts or ends above the rate of a parameter group."""
    mults = [rule.lr_mult for rule in solver.rules if rule.lr_mult is not None]
    least = solver.lr * min([1.0, *mults])
    for key in ("warmup_lr", "min_lr"):
        if (rate := solver.schedule.get(key, 0.0)) > least:
            raise ConfigError(
                f"solver.schedule.{key}: must be at most {least:g}, the smallest rate of solver.lr and solver.rules, "
                f"got {rate:g}; lower it, or raise the rates"
            )


def schedule_notes(schedule: Mapping[str, Any], epochs: int) -> list[str]:
    """Remarks for the log about a resolved schedule in a run of this length."""
    warmup = schedule.get("warmup_epochs", 0)
    if warmup < epochs:
        return []
    return [
        f"solver.schedule.warmup_epochs ({warmup}) is at least train.epochs ({epochs}), so the rate never reaches "
        "solver.lr"
    ]


def after_warmup(schedule: Schedule) -> Schedule:
    """Decorator: let a schedule begin after warm-up epochs, and add the options of warm-up to its own."""

    @functools.wraps(schedule, assigned=("__module__", "__name__", "__qualname__", "__doc__"))  # annotations differ
    def warmed_up(
        progress: Progress,
        base_lr: float,
        *,
        warmup_epochs: Annotated[int, Option(ge=0, help="epochs before the schedule proper")] = 0,
        warmup_factor: Annotated[float, Option(ge=0, le=1, help="rate of the first epoch, as a fraction of lr")] = 0.1,
        warmup: Annotated[
            Literal["linear", "constant"], Option(help="linear rise to lr, or constant at warmup_factor * lr")
        ] = "linear",
        **options: Any,
    ) -> float:
        done = progress.epoch - 1
        if done < warmup_epochs:
            risen = done / warmup_epochs if warmup == "linear" else 0.0
            return base_lr * (warmup_factor * (1 - risen) + risen)
        fraction = (done - warmup_epochs) / (progress.epochs - warmup_epochs)
        return schedule(progress._replace(fraction=fraction), base_lr, **options)

    return warmed_up


@SCHEDULES.register("cosine")
@after_warmup
def cosine(progress: Progress, base_lr: float, *, min_lr: NotNegative = 0.0) -> float:
    """Half a cosine from base_lr to min_lr.

    Args:
        min_lr: final rate, in every parameter group.
    """
    return min_lr + (base_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress.fraction))


@SCHEDULES.register("timm_cosine")
def timm_cosine(
    progress: Progress,
    base_lr: float,
    *,
    warmup_epochs: Annotated[int, Option(ge=0)] = 0,
    warmup_lr: NotNegative = 0.0,
    min_lr: NotNegative = 0.0,
) -> float:
    """timm's cosine, whose phase counts from the start of the run, warm-up included (docs/methods/ivt.md#optimisation).

    Args:
        warmup_epochs: epochs before the schedule proper.
        warmup_lr: rate that warm-up rises from (epoch 0), in every parameter group.
        min_lr: final rate, in every parameter group.
    """
    if progress.epoch < warmup_epochs:
        return warmup_lr + progress.epoch * (base_lr - warmup_lr) / warmup_epochs
    return min_lr + (base_lr - min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress.epoch / progress.epochs, 1)))


@SCHEDULES.register("step")
@after_warmup
def step(progress: Progress, base_lr: float, *, milestones: Milestones = MILESTONES, gamma: Fraction = 0.1) -> float:
    """Drop by a factor at each milestone.

    Args:
        milestones: epochs completed when the rate drops.
        gamma: factor of each drop.
    """
    return base_lr * gamma ** bisect.bisect_right(sorted(milestones), progress.epoch - 1)


@SCHEDULES.register("linear")
@after_warmup
def linear(progress: Progress, base_lr: float) -> float:
    """Straight line from base_lr to 0."""
    return base_lr * (1 - progress.fraction)


@SCHEDULES.register("exp")
@after_warmup
def exp(progress: Progress, base_lr: float, *, power: Fraction = 0.9) -> float:
    """Exponential fall from base_lr to power * base_lr, as in the published code (docs/methods/irra.md#schedules).

    Args:
        power: final rate, as a fraction of lr.
    """
    return base_lr * math.pow(power, progress.fraction)


@SCHEDULES.register("poly")
@after_warmup
def poly(progress: Progress, base_lr: float, *, power: Fraction = 0.9, min_lr: NotNegative = 0.0) -> float:
    """Rise from power * base_lr to base_lr, odd as it is in the published code (docs/methods/irra.md#schedules).

    Args:
        power: first rate, as a fraction of lr.
        min_lr: rate that power is relative to, in every parameter group.
    """
    return min_lr + (base_lr - min_lr) * math.pow(power, 1 - progress.fraction)


@SCHEDULES.register("constant")
@after_warmup
def constant(progress: Progress, base_lr: float) -> float:
    """base_lr in every epoch."""
    return base_lr
