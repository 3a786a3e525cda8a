"""Noisy correspondence: the published permutations, what they move, the batch's clean flags, RDE's caption noise."""

import hashlib
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.schema import DataConfig, load_config
from datasets.annotations import load_annotations
from datasets.loaders import TrainLoader, build_train_loader, data_tokenizer
from datasets.noise import noise_index, noise_permutation
from datasets.text.masking import augment_caption
from tests.conftest import GOLDEN
from utils.errors import ConfigError

# SHA-256 of the nine published index arrays as little-endian int64, and how many captions have moved (RDE spec 2.3).
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


def noisy_loader(root: Path, dataset: str = "synthetic", fields=("index", "caption_ids", "pids", "clean"), **options):
    config = DataConfig(dataset=dataset, root=str(root), image_size=(64, 32), batch_size=8, workers=0, **options)
    annotations = load_annotations(dataset, root)
    tokenizer = data_tokenizer(config, annotations.folder, most=10**6)
    return build_train_loader(
        config, annotations, tokenizer, fields=set(fields), full_text=True, seed=1, pin_memory=False
    )


# --- the permutation ------------------------------------------------------------------------------------------------


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
        assert len(fewer - more) <= 5  # those that got their own caption back
    assert not np.array_equal(noise_permutation(500, 0.3, seed=2), noise_permutation(500, 0.3, seed=1))
    np.random.seed(7)
    state = np.random.random()
    np.random.seed(7)
    noise_permutation(500, 0.5)
    assert np.random.random() == state  # the global stream is left alone


# --- training pairs -------------------------------------------------------------------------------------------------


def test_only_captions_move(root: Path) -> None:
    clean, noisy = noisy_loader(root), noisy_loader(root, noise_rate=0.5)
    index = noise_permutation(len(clean.pairs), 0.5)
    assert noisy.pairs.noise is not None and np.array_equal(noisy.pairs.noise, index)
    for place, (before, after) in enumerate(zip(clean.pairs.pairs, noisy.pairs.pairs, strict=True)):
        assert after.record == before.record
        assert after.caption == clean.pairs.pairs[index[place]].caption
    assert Counter(pair.caption for pair in noisy.pairs.pairs) == Counter(pair.caption for pair in clean.pairs.pairs)
    flags = {}
    for batch in noisy.epoch(1):
        flags |= dict(zip(batch["index"].tolist(), batch["clean"].tolist(), strict=True))
    assert [flags[place] for place in range(len(index))] == (index == np.arange(len(index))).tolist()
    assert 0 < sum(flags.values()) < len(flags)
    assert all(batch["clean"].all() for batch in clean.epoch(1))


def test_batches_have_the_moved_captions_and_the_images_own_pids(root: Path) -> None:
    loader = noisy_loader(root, noise_rate=0.8)
    for batch in loader.epoch(1):
        for place, ids, pid in zip(batch["index"].tolist(), batch["caption_ids"], batch["pids"].tolist(), strict=True):
            pair = loader.pairs.pairs[place]
            assert torch.equal(ids, loader.pairs.tokenizer.encode(pair.caption))
            assert pid == loader.pairs.labels[pair.record.pid]


def test_every_text_of_a_pair_is_of_the_moved_caption(root: Path) -> None:
    loader = noisy_loader(root, noise_rate=0.8, views=2, text_levels=["sentence", "sentence", "sentence"])
    clean = [item for batch in loader.epoch(1) for item in batch["clean"].view(-1, 3).tolist()]
    assert all(len(set(flags)) == 1 for flags in clean) and len(clean) == len(loader.pairs)


def test_attributes_move_with_their_caption(root: Path) -> None:
    from dataclasses import replace

    from datasets.pairs import TrainPairs

    records = [
        replace(record, attributes=tuple({"of": caption} for caption in record.captions))
        for record in load_annotations("synthetic", root).train
    ]
    pairs = TrainPairs(records, {}, None, None, [], 1, DataConfig(noise_rate=0.9))  # type: ignore[arg-type]
    assert all(pair.attributes == {"of": pair.caption} for pair in pairs.pairs)


def test_noisy_pairs_can_be_left_out(root: Path) -> None:
    loader = noisy_loader(root, noise_rate=0.5, noise_drop=True)
    whole = noisy_loader(root)
    index = noise_permutation(len(whole.pairs), 0.5)
    assert loader.pairs.pairs == [whole.pairs.pairs[place] for place in np.flatnonzero(index == np.arange(len(index)))]
    batches = list(loader.epoch(1))
    assert sum(len(batch["index"]) for batch in batches) == len(loader.pairs) < len(whole.pairs)
    assert all(batch["clean"].all() for batch in batches)


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
        (np.arange(31), r"is of 31 pairs, but 32 are trained on .*eval\.select_on=test"),
        (np.zeros(32, dtype=np.int64), r"no permutation of 0\.\.31"),
        (np.arange(32) + 1, r"no permutation of 0\.\.31"),
        (np.arange(32.0), "one row of whole numbers"),
        (np.arange(32).reshape(2, 16), "one row of whole numbers"),
        (np.arange(32), r"moves 0 of 32 captions, which is not data\.noise_rate, 0\.5"),
        (np.array([object()] * 32), "cannot be read"),
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


@pytest.mark.parametrize(
    "override, message",
    [
        ("data.noise_rate=1", r"data\.noise_rate: is a part of the captions, less than 1, is 1\.0"),
        ("data.noise_rate=-0.1", r"data\.noise_rate: must not be negative"),
        ("data.noise_rate=nan", r"data\.noise_rate: "),
        ("data.noise_rate=half", r"data\.noise_rate: "),
        ("data.noise_seed=-1", r"data\.noise_seed: must not be negative"),
        ("data.noise_seed=4294967296", r"data\.noise_seed: must be less than 2\*\*32"),
        ("data.noise_file=x.npy", r"data\.noise_file: needs data\.noise_rate"),
        ("data.text_aug=1.5", r"data\.text_aug: is a part of the tokens, at most 1"),
        ("data.text_aug=-1", r"data\.text_aug: must not be negative"),
    ],
)
def test_bad_options_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("configs/irra.yaml", [override])


# --- caption augmentation -------------------------------------------------------------------------------------------


def loop_augment(ids: list[int], mask_id: int, rate: float, rng: np.random.Generator) -> list[int]:
    """The rule of RDE spec 6, one token after the other, from the same stream of draws."""
    draws = iter(rng.random(sum(0 < token < mask_id for token in ids)))
    kept: list[int | None] = []
    for token in ids:
        if not 0 < token < mask_id:
            kept.append(token)
            continue
        draw = next(draws)
        if draw >= rate:
            kept.append(token)
        elif draw < 0.6 * rate:
            kept.append(mask_id)
        elif draw < 0.8 * rate:
            kept.append(None)  # a random token
    randoms = iter(rng.integers(1, mask_id, kept.count(None)))
    found = [int(next(randoms)) if token is None else token for token in kept]
    return found + [0] * (len(ids) - len(found))


@pytest.mark.parametrize("seed", range(20))
def test_augmentation_follows_the_rule(seed: int) -> None:
    length = 5 + seed
    ids = torch.tensor([101, *np.random.default_rng(seed).integers(0, 100, length).tolist(), 102] + [0] * 7)
    before = ids.clone()
    changed = augment_caption(ids, 100, 0.5, np.random.default_rng(seed + 50))
    assert changed.tolist() == loop_augment(ids.tolist(), 100, 0.5, np.random.default_rng(seed + 50))
    assert torch.equal(ids, before) and changed.shape == ids.shape and changed.dtype == torch.int64
    assert changed[0] == 101 and (changed == 102).sum() == 1


def test_augmentation_rates() -> None:
    ids, rng, count = torch.tensor([901, *range(1, 51), 902]), np.random.default_rng(0), Counter[str]()
    for _ in range(400):
        changed = augment_caption(ids, 900, 0.2, rng)
        count["deleted"] += int((changed == 0).sum())
        count["masked"] += int((changed == 900).sum())
        count["random"] += int(((changed > 50) & (changed < 900)).sum())
    for name, part in {"masked": 0.12, "random": 0.04 * 849 / 899, "deleted": 0.04}.items():
        assert count[name] / 20_000 == pytest.approx(part, rel=0.12), name


def test_captions_are_augmented_anew_each_epoch_and_the_same_again(root: Path) -> None:
    plain, loader = noisy_loader(root), noisy_loader(root, text_aug=0.4)

    def captions(loader: TrainLoader, epoch: int) -> list[list[int]]:
        return [ids for batch in loader.epoch(epoch) for ids in batch["caption_ids"].tolist()]

    assert captions(loader, 1) == captions(loader, 1) != captions(loader, 2)
    changed = [a != b for a, b in zip(captions(plain, 1), captions(loader, 1), strict=True)]
    assert sum(changed) > 0.9 * len(changed)


def test_masks_are_drawn_on_the_augmented_caption(root: Path) -> None:
    loader = noisy_loader(root, text_aug=0.4, fields=("caption_ids", "mlm_ids", "mlm_labels"))
    for batch in loader.epoch(1):
        labels = batch["mlm_labels"]
        assert torch.equal(batch["caption_ids"][labels != 0], labels[labels != 0])


def test_only_clips_tokens_can_be_augmented(root: Path) -> None:
    from datasets.pairs import TrainPairs

    with pytest.raises(ConfigError, match=r"data\.text_aug: changes captions of CLIP's tokenizer"):
        TrainPairs(load_annotations("synthetic", root).train, {}, None, None, [], 1, DataConfig(text_aug=0.2))  # type: ignore[arg-type]
