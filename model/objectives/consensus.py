"""Confident consensus division: tell clean from noisy training pairs by their losses (RDE)."""

import warnings
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from utils.errors import TrainingError

Fit = Literal["auto", "short", "long"]
Floats = npt.NDArray[np.floating]
Booleans = npt.NDArray[np.bool_]


class FitSettings(NamedTuple):
    """Arguments of scikit-learn's GaussianMixture."""

    max_iter: int
    tol: float
    reg_covar: float


FITS = {"short": FitSettings(10, 1e-2, 5e-4), "long": FitSettings(100, 1e-4, 1e-6)}


def choose_fit(fit: Fit, noise_rate: float, dataset: str) -> FitSettings:
    """Settings of the mixture; `auto` is the authors' rule and uses the true noise rate.

    See docs/methods/rde.md#confident-consensus-division.
    """
    if fit == "auto":
        fit = "long" if noise_rate > 0.4 or dataset == "rstpreid" else "short"
    return FITS[fit]


def divide(losses: Floats, settings: FitSettings, rng: np.random.Generator) -> Booleans:
    """Mask of the clean pairs (N,) (Qin et al., CVPR 2024, https://arxiv.org/abs/2308.09911, section 3.3).

    Each of K rows of losses votes. Pairs that all rows agree on are clean or noisy; a coin decides about the others.

    Args:
        losses: (K, N), one row per kind of embedding.
        settings: arguments of the mixture.
        rng: generator of the N coins, which are thrown whatever the votes.

    Raises:
        TrainingError: a loss is not finite.
    """
    if not np.isfinite(losses).all():
        bad = int((~np.isfinite(losses)).any(axis=0).sum())
        raise TrainingError(
            f"the losses of {bad} of {losses.shape[1]} training pairs are not finite, so they cannot be divided into "
            "clean and noisy ones: the model has diverged. Try a lower solver.lr"
        )
    votes = np.stack([looks_clean(row, settings) for row in losses])
    coins = rng.random(losses.shape[1]) < 0.5
    return np.where(votes.all(axis=0), True, np.where(votes.any(axis=0), coins, False))


def looks_clean(losses: Floats, settings: FitSettings) -> Booleans:
    """Mask of the losses (N,) more likely to belong to the lower of two Gaussians; all of them if they are equal."""
    if losses.min() == losses.max():
        return np.ones(len(losses), dtype=bool)
    return confident(low_posterior(losses, settings))


def low_posterior(losses: Floats, settings: FitSettings) -> npt.NDArray[np.float64]:
    """Posterior (N,) of the lower component of two Gaussians fitted to the losses, scaled to [0, 1]."""
    from sklearn.exceptions import ConvergenceWarning  # slow to import, and only RDE needs it
    from sklearn.mixture import GaussianMixture

    scaled = (losses - losses.min()) / (losses.max() - losses.min())
    scaled = scaled.astype(np.float64)[:, None]
    mixture = GaussianMixture(n_components=2, random_state=0, **settings._asdict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # `short` stops early on purpose
        mixture.fit(scaled)
    posterior: npt.NDArray[np.float64] = mixture.predict_proba(scaled)[:, mixture.means_.argmin()]
    return posterior


def confident(posterior: npt.NDArray[np.float64]) -> Booleans:
    """Mask of posteriors (N,) above 0.5. If all are, of those above the (N // 100 + 1)-th lowest, so some are noisy."""
    threshold = 0.5
    if posterior.min() > threshold:
        threshold = np.sort(posterior)[len(posterior) // 100]
    return posterior > threshold
