"""Noisy correspondence: the field's benchmark permutes the captions of some training pairs (Qin et al., CVPR 2024)."""

import numpy as np
import numpy.typing as npt

from configs.schema import DataConfig
from utils.errors import ConfigError

Index = npt.NDArray[np.int64]


def noise_permutation(n: int, rate: float, seed: int = 1) -> Index:
    """Which pair's caption each of n pairs has, int64 (n,) (RDE datasets/build.py, inject_noisy_correspondence).

    int(rate * n) pairs are chosen and their captions shuffled among them; a few may get their own back. The chosen
    pairs of a rate contain those of every smaller one. With seed 1 these are the published index files, bit for bit.
    """
    rng = np.random.RandomState(seed)  # the legacy stream: the files were made with it
    index, order = np.arange(n), np.arange(n)
    rng.shuffle(order)
    chosen = order[: int(rate * n)]
    shuffled = chosen.copy()
    rng.shuffle(shuffled)
    index[chosen] = shuffled
    return index


def noise_index(config: DataConfig, n: int) -> Index | None:
    """The permutation that a config asks for, None where it asks for none.

    Raises:
        ConfigError: the file is no permutation of n pairs, or moves another part of them than `noise_rate`.
    """
    if config.noise_rate == 0:
        return None
    if config.noise_file is None:
        return noise_permutation(n, config.noise_rate, config.noise_seed)
    return _read_index(config.noise_file, n, config.noise_rate)


def _read_index(path: str, n: int, rate: float) -> Index:
    try:
        index = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ConfigError(f"data.noise_file: {path} cannot be read as a .npy file ({error})") from None
    if not isinstance(index, np.ndarray) or index.ndim != 1 or index.dtype.kind not in "iu":
        raise ConfigError(f"data.noise_file: {path} must hold one row of whole numbers, a permutation of the pairs")
    if len(index) != n:
        raise ConfigError(
            f"data.noise_file: {path} is of {len(index)} pairs, but {n} are trained on "
            "(a val split that is carved from train takes pairs away: eval.select_on=test keeps all of them)"
        )
    if not np.array_equal(np.sort(index), np.arange(n)):
        raise ConfigError(f"data.noise_file: {path} is no permutation of 0..{n - 1}")
    moved = int((index != np.arange(n)).sum())
    if abs(moved - rate * n) > max(10, n // 100):  # a few of the chosen may have got their own caption back
        raise ConfigError(
            f"data.noise_file: {path} moves {moved} of {n} captions, which is not data.noise_rate, {rate}"
        )
    return index.astype(np.int64)
