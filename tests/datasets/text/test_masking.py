"""Masked and augmented captions: the authors' draws from given random streams, rates, and protected tokens."""

from collections import Counter

import numpy as np
import pytest
import torch

from datasets.text.masking import augment_caption, mask_caption, random_mask

MASK, START, END = 49405, 49406, 49407


def caption(*tokens: int, length: int = 12) -> torch.Tensor:
    ids = torch.zeros(length, dtype=torch.int64)
    ids[: len(tokens) + 2] = torch.tensor([START, *tokens, END])
    return ids


def test_draws_are_consumed_in_the_authors_order(irra_golden: dict[str, np.ndarray]) -> None:
    used = {"uniforms": 0, "choices": 0}

    def stream(name: str):
        def take(count: int) -> np.ndarray:
            used[name] += count
            return irra_golden[f"mask0/{name}"][used[name] - count : used[name]]

        return take

    original = torch.from_numpy(irra_golden["mask0/orig_ids"])
    before = original.clone()
    ids, labels = mask_caption(original, MASK, stream("uniforms"), stream("choices"))
    np.testing.assert_array_equal(ids.numpy(), irra_golden["mask0/mlm_ids"])
    np.testing.assert_array_equal(labels.numpy(), irra_golden["mask0/mlm_labels"])
    np.testing.assert_array_equal(ids.numpy(), irra_golden["mask0/caption_ids_after"])  # the authors mask in place
    assert used == {"uniforms": irra_golden["mask0/n_uniforms_used"], "choices": irra_golden["mask0/n_choices_used"]}
    torch.testing.assert_close(original, before)


def test_each_part_of_the_draw_does_its_own() -> None:
    draws = np.array([0.1499, 0.15, 0.0, 0.1199, 0.1201, 0.1349, 0.1351])
    ids, labels = mask_caption(caption(1, 2, 3, 4, 5, 6, 7), MASK, lambda n: draws[:n], lambda n: np.full(n, 999))
    assert ids[1:8].tolist() == [1, 2, MASK, MASK, 999, 999, 7]
    assert labels[1:8].tolist() == [1, 0, 3, 4, 5, 6, 7]


def test_when_nothing_is_drawn_the_first_token_is_masked() -> None:
    ids, labels = mask_caption(caption(5, 6), MASK, np.ones, np.ones)
    assert ids.tolist()[:4] == [START, MASK, 6, END]
    assert labels.tolist()[:4] == [0, 5, 0, 0]


def test_an_empty_caption_gives_up_its_end_token() -> None:
    ids, labels = mask_caption(caption(), MASK, np.ones, np.ones)
    assert ids.tolist()[:3] == [START, MASK, 0]
    assert labels.tolist()[:3] == [0, END, 0]


def test_rates_and_untouchable_tokens() -> None:
    rng = np.random.default_rng(0)
    original = caption(*range(1, 2001), 0, MASK, length=2100)
    ids, labels = random_mask(original, MASK, rng)
    predicted = labels != 0
    assert 0.12 < predicted[1:2001].float().mean() < 0.18
    assert not predicted[0] and not predicted[2001:].any()
    masked = (ids[predicted] == MASK).float().mean()
    unchanged = (ids[predicted] == original[predicted]).float().mean()
    assert 0.74 < masked < 0.86 and 0.05 < unchanged < 0.16
    torch.testing.assert_close(ids[~predicted], original[~predicted])
    torch.testing.assert_close(labels[predicted], original[predicted])
    assert int(ids.min()) == 0 and int(ids[predicted].min()) > 0


# --- augmentation -----------------------------------------------------------------------------------------------------


def loop_augment(ids: list[int], mask_id: int, rate: float, rng: np.random.Generator) -> list[int]:
    """RDE's caption augmentation, token by token, from the same random stream."""
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
