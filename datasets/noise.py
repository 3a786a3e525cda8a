"""Noisy correspondence: captions of some training pairs are permuted (docs/methods/rde.md#noisy-correspondence)."""

import numpy as np
import numpy.typing as npt

from configs.schema import DataConfig
from utils.errors import ConfigError, first_line
from utils.paths import in_full, why_not_a_file

Index = npt.NDArray[np.int64]


def noise_permutation(n: int, rate: float, seed: int = 1) -> Index:
    """Source pair of the caption of each pair, int64 (n,).

    int(rate * n) pairs are chosen and their captions are shuffled among them; a few may keep theirs. The pairs chosen
    at a rate include those of all lower rates. With seed 1 the result equals the published index files
    (QinYang79/RDE@867bd37:2024-CVPR-RDE/datasets/bases.py:inject_noisy_correspondence).

    Args:
        n: number of pairs.
        rate: fraction of the pairs that are chosen.
        seed: random seed.
    """
    rng = np.random.RandomState(seed)  # the legacy generator, which made the published files
    index, order = np.arange(n), np.arange(n)
    rng.shuffle(order)
    chosen = order[: int(rate * n)]
    shuffled = chosen.copy()
    rng.shuffle(shuffled)
    index[chosen] = shuffled
    return index


def noise_index(config: DataConfig, n: int) -> Index | None:
    """The permutation that a config asks for; None without noise.

    Args:
        config: data settings.
        n: number of pairs.

    Raises:
        ConfigError: the file does not hold a permutation of n pairs, or does not match `noise_rate`.
    """
    if config.noise_rate == 0:
        return None
    if config.noise_file is None:
        return noise_permutation(n, config.noise_rate, config.noise_seed)
    return _read_index(config.noise_file, n, config.noise_rate)


def _read_index(path: str, n: int, rate: float) -> Index:
    if kind := why_not_a_file(path):
        raise ConfigError(f"data.noise_file: must be a .npy file, got {kind} ({path})")
    try:
        # Mapped, so that a header with an immense shape allocates nothing.
        index = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy raises errors of many types for damaged headers and archives
        raise ConfigError(
            f"data.noise_file: must be a .npy file, got {in_full(path)} ({first_line(error)[:200]})"
        ) from None
    if not isinstance(index, np.ndarray) or index.ndim != 1 or index.dtype.kind not in "iu":
        raise ConfigError(f"data.noise_file: must hold a 1-D array of integers, got another content in {path}")
    if len(index) != n:
        raise ConfigError(
            f"data.noise_file: must permute {n} training pairs, got {len(index)} in {path}; a held-out val split "
            "removes training pairs, eval.select_on=test keeps all of them"
        )
    if not np.array_equal(np.sort(index), np.arange(n)):
        raise ConfigError(f"data.noise_file: must be a permutation of 0..{n - 1}, got {path}")
    moved = int((index != np.arange(n)).sum())
    if abs(moved - rate * n) > max(10, n // 100):  # a few of the chosen pairs may keep their caption
        raise ConfigError(
            f"data.noise_file: {path} permutes {moved} of {n} captions, got data.noise_rate={rate}; set it to "
            f"{moved / n:.2f}"
        )
    return index.astype(np.int64)
