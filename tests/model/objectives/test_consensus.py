"""Confident consensus division: the authors' mixture and votes, clusters, corner cases."""

import numpy as np
import pytest

from model.objectives.consensus import FITS, choose_fit, confident, divide, looks_clean, low_posterior
from tests.helpers.golden import golden_case
from utils.errors import TrainingError


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return golden_case("rde_public.npz")


@pytest.mark.parametrize("fit", FITS)
def test_the_mixture_is_the_authors(fit: str, golden: dict[str, np.ndarray]) -> None:
    votes = np.zeros(400, dtype=int)
    for branch in "AB":
        losses = golden[f"ccd/loss{branch}"]
        assert losses.dtype == np.float32
        posterior = low_posterior(losses, FITS[fit])
        np.testing.assert_allclose(posterior, golden[f"ccd/{fit}/prob{branch}"], rtol=0, atol=1e-10)
        clean = looks_clean(losses, FITS[fit])
        assert np.array_equal(clean, golden[f"ccd/{fit}/pred{branch}"].astype(bool))
        votes += clean
    assert np.array_equal(votes, golden[f"ccd/{fit}/votes"])


def test_where_nothing_looks_noisy_a_hundredth_is_taken_out(golden: dict[str, np.ndarray]) -> None:
    posterior = golden["ccd/corner_prob"]
    assert posterior.min() > 0.5
    assert np.array_equal(confident(posterior), golden["ccd/corner_pred"].astype(bool))
    for n in (1, 99, 100, 350, 1000):
        posterior = np.random.default_rng(n).permutation(np.linspace(0.6, 0.9, n))
        assert (~confident(posterior)).sum() == n // 100 + 1
        assert posterior[~confident(posterior)].max() <= posterior.min() + 0.3 * (n // 100) / max(n - 1, 1) + 1e-12
    assert np.array_equal(confident(np.array([0.5, 0.4, 0.51])), [False, False, True])


def test_equal_losses_all_look_clean() -> None:
    for fit in FITS.values():
        assert looks_clean(np.full(50, 1.7, dtype=np.float32), fit).all()
        assert divide(np.zeros((2, 50), dtype=np.float32), fit, np.random.default_rng(0)).all()


@pytest.mark.parametrize("fit", FITS)
def test_two_clusters_are_told_apart(fit: str) -> None:
    rng = np.random.default_rng(0)
    clean = rng.random(600) < 0.6
    losses = np.where(clean, rng.normal(0.2, 0.05, (2, 600)), rng.normal(1.5, 0.1, (2, 600))).astype(np.float32)
    assert np.array_equal(divide(losses, FITS[fit], np.random.default_rng(1)), clean)


def test_votes() -> None:
    """Agreement of both embeddings decides; otherwise a coin that depends on seed and epoch does."""
    low, high = np.full(300, 0.1), np.full(300, 2.0)
    spread = np.linspace(0, 0.05, 300)
    losses = np.stack([np.concatenate([low, high, low]), np.concatenate([low, high, high])]) + np.tile(spread, 3)
    counted = divide(losses, FITS["long"], np.random.default_rng([1, 5]))
    assert counted[:300].all() and not counted[300:600].any()
    assert 110 < counted[600:].sum() < 190
    assert np.array_equal(counted, divide(losses, FITS["long"], np.random.default_rng([1, 5])))
    assert not np.array_equal(counted, divide(losses, FITS["long"], np.random.default_rng([1, 6])))
    one = divide(losses[:1], FITS["long"], np.random.default_rng(0))  # a single embedding decides alone
    assert np.array_equal(one, np.concatenate([np.ones(300), np.zeros(300), np.ones(300)]).astype(bool))


def test_losses_that_are_not_finite_stop() -> None:
    losses = np.ones((2, 9), dtype=np.float32)
    losses[0, 3], losses[1, 3], losses[1, 5] = np.nan, np.inf, np.nan
    with pytest.raises(TrainingError, match="the losses of 2 of 9 training pairs are not finite"):
        divide(losses, FITS["short"], np.random.default_rng(0))


def test_the_authors_rule_for_the_fit() -> None:
    assert choose_fit("auto", 0.4, "cuhk_pedes") == FITS["short"] == (10, 1e-2, 5e-4)
    assert choose_fit("auto", 0.5, "cuhk_pedes") == FITS["long"] == (100, 1e-4, 1e-6)
    assert choose_fit("auto", 0.0, "rstpreid") == FITS["long"]
    assert choose_fit("short", 0.8, "rstpreid") == FITS["short"]
    assert choose_fit("long", 0.0, "icfg_pedes") == FITS["long"]
