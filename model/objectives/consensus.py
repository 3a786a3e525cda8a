"""Confident consensus division (Qin et al., CVPR 2024): which training pairs look clean, by their losses."""

import warnings
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from utils.errors import TrainingError

Fit = Literal["auto", "short", "long"]
Floats = npt.NDArray[np.floating]
Booleans = npt.NDArray[np.bool_]


class FitSettings(NamedTuple):
    """Of scikit-learn's GaussianMixture."""

    max_iter: int
    tol: float
    reg_covar: float


FITS = {"short": FitSettings(10, 1e-2, 5e-4), "long": FitSettings(100, 1e-4, 1e-6)}


def choose_fit(fit: Fit, noise_rate: float, dataset: str) -> FitSettings:
    """`auto` is the authors' rule, which knows how much noise there is (RDE main; RDE spec 5.2)."""
    if fit == "auto":
        fit = "long" if noise_rate > 0.4 or dataset == "rstpreid" else "short"
    return FITS[fit]


def divide(losses: Floats, settings: FitSettings, rng: np.random.Generator) -> Booleans:
    """Whether each pair counts in the coming epoch, (N,) (RDE processor/processor.py:get_loss; RDE spec 5.1).

    Each of K rows of losses votes. Where all agree, that is the answer, and elsewhere a coin is thrown.

    Args:
        losses: (K, N), one row for each kind of embedding.
        settings: of the fit.
        rng: of the coins; N of them are thrown, whatever the votes.

    Raises:
        TrainingError: a loss is not finite.
    """
    if not np.isfinite(losses).all():
        bad = int((~np.isfinite(losses)).any(axis=0).sum())
        raise TrainingError(
            f"the losses of {bad} of {losses.shape[1]} training pairs are not finite, so they cannot be "
            "divided into clean and noisy ones: the model has diverged; try a lower solver.lr"
        )
    votes = np.stack([looks_clean(row, settings) for row in losses])
    coins = rng.random(losses.shape[1]) < 0.5
    return np.where(votes.all(axis=0), True, np.where(votes.any(axis=0), coins, False))


def looks_clean(losses: Floats, settings: FitSettings) -> Booleans:
    """Whether each loss (N,) is more likely of the lower of two Gaussians; equal ones, which tell nothing, all are."""
    if losses.min() == losses.max():
        return np.ones(len(losses), dtype=bool)
    return confident(low_posterior(losses, settings))


def low_posterior(losses: Floats, settings: FitSettings) -> npt.NDArray[np.float64]:
    """Posterior probability (N,) that a loss, scaled to [0, 1], is of the lower component of two Gaussians."""
    from sklearn.exceptions import ConvergenceWarning  # here, because its import takes what few programs need
    from sklearn.mixture import GaussianMixture

    scaled = (losses - losses.min()) / (losses.max() - losses.min())
    scaled = scaled.astype(np.float64)[:, None]
    mixture = GaussianMixture(n_components=2, random_state=0, **settings._asdict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # `short` is meant to stop early
        mixture.fit(scaled)
    posterior: npt.NDArray[np.float64] = mixture.predict_proba(scaled)[:, mixture.means_.argmin()]
    return posterior


def confident(posterior: npt.NDArray[np.float64]) -> Booleans:
    """Posteriors (N,) above 0.5; where all are, those above the (N // 100 + 1)-th lowest: some pairs always go."""
    threshold = 0.5
    if posterior.min() > threshold:
        threshold = np.sort(posterior)[len(posterior) // 100]
    return posterior > threshold
