"""Noisy correspondence: the published permutations, bit for bit, and permutations from a file."""

import hashlib
import itertools
from pathlib import Path

import numpy as np
import pytest

from configs.schema import DataConfig
from datasets.noise import noise_index, noise_permutation
from tests.helpers.configs import GOLDEN
from tests.helpers.loaders import noisy_loader
from utils.errors import ConfigError

# Number of moved captions and SHA-256 of the nine index arrays that RDE publishes, as little-endian int64.
PUBLISHED = {
    ("cuhk_pedes", 68126, 0.2): (13624, "3516fa7d900a6f79408d355ffeb7329bcf79b71a86791ca7002eb704aea86603"),
    ("cuhk_pedes", 68126, 0.5): (34062, "173348b248297b97eb2887b5936f099e99b230d7e3c2d9e5f77439cc601519c1"),
    ("cuhk_pedes", 68126, 0.8): (54500, "8a688c5553bc8482442be6c34e6aee8d0fee56fce9b47f2985d188f700588ba0"),
    ("icfg_pedes", 34674, 0.2): (6933, "cb0daebb05ddd2e29b7840585b552911de08d1eb00f884acbb67ebb7c809f466"),
    ("icfg_pedes", 34674, 0.5): (17337, "e5598a876ea8cfdbfff9aedf85d22fa7dde437c8527061e67dc9db1228c71d0e"),
    ("icfg_pedes", 34674, 0.8): (27737, "98a30f9e579f557b091aa5496341aba720caeea3fc3455b4091ce1814f4bdcad"),
    ("rstpreid", 37010, 0.2): (7400, "9ed898203391cc953b2bf6f1e79b6efcbb739abee4e908f67319264ea5a0e01d"),
    ("rstpreid", 37010, 0.5): (18505, "16824df5c91b5f6383d85d84858d87827ff13a4bc3214d197c28251cfda99eb6"),
    ("rstpreid", 37010, 0.8): (29605, "3099ed399629ac95bf6adf04d33591f0107c311d97d2c87c7e261021d2aea8b5"),
}


@pytest.mark.parametrize("case", PUBLISHED, ids=str)
def test_the_published_files_are_reproduced_bit_for_bit(case: tuple[str, int, float]) -> None:
    _, n, rate = case
    moved, digest = PUBLISHED[case]
    index = noise_permutation(n, rate)
    assert index.dtype == np.int64 and index.shape == (n,)
    assert int((index != np.arange(n)).sum()) == moved
    assert hashlib.sha256(index.astype("<i8").tobytes()).hexdigest() == digest


def test_first_entries_are_the_published_ones() -> None:
    expected = [0, 1, 29344, 22648, 4, 5, 6, 7, 56664, 9, 26435, 11392]
    assert noise_permutation(68126, 0.5)[:12].tolist() == expected


@pytest.mark.parametrize("rate", ["0.2", "0.5", "0.8"])
def test_golden_permutations(rate: str) -> None:
    golden = np.load(GOLDEN / "rde_public.npz")
    index = noise_permutation(100, float(rate))
    assert np.array_equal(index, golden[f"case0/noise/{rate}/index"])
    assert np.array_equal(index == np.arange(100), golden[f"case0/noise/{rate}/clean_flag"].astype(bool))


def test_it_is_a_permutation_and_larger_rates_choose_more_of_the_same_pairs() -> None:
    places = np.arange(500)
    assert np.array_equal(noise_permutation(500, 0), places)
    kept = [set(places[noise_permutation(500, rate) == places]) for rate in (0.1, 0.3, 0.6, 0.99)]
    for rate in (0.1, 0.3, 0.6, 0.99):
        index = noise_permutation(500, rate, seed=3)
        assert np.array_equal(np.sort(index), places)
        assert int(rate * 500) - 5 <= (index != places).sum() <= int(rate * 500)
    for more, fewer in itertools.pairwise(kept):
        assert len(fewer - more) <= 5  # pairs that drew their own caption
    assert not np.array_equal(noise_permutation(500, 0.3, seed=2), noise_permutation(500, 0.3, seed=1))
    np.random.seed(7)
    state = np.random.random()
    np.random.seed(7)
    noise_permutation(500, 0.5)
    assert np.random.random() == state  # the global random state is unchanged


# --- files ------------------------------------------------------------------------------------------------------------


def test_a_file_gives_the_permutation(root: Path, tmp_path: Path) -> None:
    n = len(noisy_loader(root).pairs)
    index = noise_permutation(n, 0.5, seed=9)
    np.save(tmp_path / "noise.npy", index.astype(np.int32))
    loader = noisy_loader(root, noise_rate=0.5, noise_file=str(tmp_path / "noise.npy"))
    assert loader.pairs.noise is not None and np.array_equal(loader.pairs.noise, index)
    assert loader.pairs.noise.dtype == np.int64
    assert noise_index(DataConfig(noise_rate=0.0), n) is None


@pytest.mark.parametrize(
    "index, message",
    [
        (np.arange(31), r"must permute 32 training pairs, got 31 .*eval\.select_on=test"),
        (np.zeros(32, dtype=np.int64), r"must be a permutation of 0\.\.31"),
        (np.arange(32) + 1, r"must be a permutation of 0\.\.31"),
        (np.arange(32.0), "must hold a 1-D array of integers"),
        (np.arange(32).reshape(2, 16), "must hold a 1-D array of integers"),
        (np.arange(32), r"permutes 0 of 32 captions, got data\.noise_rate=0\.5"),
        (np.array([object()] * 32), r"must be a \.npy file"),
    ],
)
def test_bad_files_are_refused(root: Path, tmp_path: Path, index: np.ndarray, message: str) -> None:
    path = tmp_path / "noise.npy"
    np.save(path, index)
    with pytest.raises(ConfigError, match=r"data\.noise_file: .*" + message):
        noisy_loader(root, noise_rate=0.5, noise_file=str(path))


def test_a_file_that_is_missing_cut_or_an_archive_is_refused(root: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "whole.npy", np.arange(32))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:100])
    (tmp_path / "empty.npy").write_bytes(b"")
    np.savez(tmp_path / "many.npz", index=np.arange(32))
    for name in ("missing.npy", "cut.npy", "empty.npy", "many.npz", "."):
        with pytest.raises(ConfigError, match=r"data\.noise_file: "):
            noisy_loader(root, noise_rate=0.5, noise_file=str(tmp_path / name))


def test_a_device_is_no_noise_file() -> None:
    with pytest.raises(ConfigError, match=r"data\.noise_file: must be a \.npy file, got a device \(/dev/zero\)"):
        noise_index(DataConfig(noise_rate=0.5, noise_file="/dev/zero"), 4)


def header(descr: object, shape: object) -> str:
    return f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}}}"


@pytest.mark.parametrize(
    "text",
    [
        header("<i8", (10**15,)),
        header("<i8", (10**22,)),
        header("<i8", (-1,)),
        header("<i8", f"({'9' * 5000},)"),
        header("|O", (32,)),
        header([("a", "<i8")], (32,)),
        header("<M8[s]", (32,)),
        header({"a": 1}, (32,)),
        header("<i8", (32,)) + " " * 20_000,
        "-" * 9000 + "1",
        "{'descr':",
        "{[]: 1}",
    ],
    ids=lambda text: text[:40],
)
def test_a_hand_made_header_is_one_clear_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "noise.npy"
    size = len(text).to_bytes(4, "little")
    path.write_bytes(b"\x93NUMPY\x02\x00" + size + text.encode() + np.arange(32).tobytes())
    with pytest.raises(ConfigError, match=r"data\.noise_file: must [^\n]*\Z"):
        noise_index(DataConfig(noise_rate=0.5, noise_file=str(path)), 32)


@pytest.mark.parametrize("content", [b"PK\x03\x04junk", b"PK\x05\x06" + bytes(18), b"\x80\x04\x95"])
def test_a_broken_archive_or_pickle_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "noise.npy").write_bytes(content)
    with pytest.raises(ConfigError, match=r"data\.noise_file: must "):
        noise_index(DataConfig(noise_rate=0.5, noise_file=str(tmp_path / "noise.npy")), 32)
