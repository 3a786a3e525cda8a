"""What is done to the tokens of a training caption: masks for the masked language loss, augmentation."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

MASK_RATE = 0.15  # of the tokens are to be predicted; of those
MASK_BELOW = 0.8  # become the mask token below this part of the draw,
RANDOM_BELOW = 0.9  # a random token up to this one, and stay as they are above
MASK_PART = 0.6  # augmentation: of the chosen tokens, up to here they are masked,
RANDOM_PART = 0.8  # up to here replaced, and deleted above

Uniforms = Callable[[int], np.ndarray]  # n -> n floats in [0, 1)
Choices = Callable[[int], np.ndarray]  # n -> n token ids in 1..mask_id - 1


def mask_caption(caption_ids: Tensor, mask_id: int, uniforms: Uniforms, choices: Choices) -> tuple[Tensor, Tensor]:
    """Masked language modelling on one caption (IRRA datasets/bases.py:ImageTextMLMDataset, spec 1.5).

    One uniform number is drawn for each token with 0 < id < mask_id, in order: never for padding, mask, start or end
    of text. Where none is chosen, the first token after the start of text is masked, whatever it is.

    Args:
        caption_ids: int64 (L,), not changed.
        mask_id: the mask token; start and end of text have larger ids.
        uniforms: source of the draws; consumed one per eligible token.
        choices: source of random tokens; consumed one per token that is replaced by a random one.

    Returns:
        mlm_ids and mlm_labels, int64 (L,): labels are the original token where it is to be predicted, else 0.
    """
    ids = caption_ids.numpy().copy()
    labels = np.zeros_like(ids)
    eligible = np.flatnonzero((ids > 0) & (ids < mask_id))
    draws = np.asarray(uniforms(len(eligible))) / MASK_RATE
    predicted = eligible[draws < 1]
    draws = draws[draws < 1]
    labels[predicted] = ids[predicted]
    ids[predicted[draws < MASK_BELOW]] = mask_id
    random_ones = predicted[(draws >= MASK_BELOW) & (draws < RANDOM_BELOW)]
    ids[random_ones] = choices(len(random_ones))
    if not labels.any():
        labels[1], ids[1] = ids[1], mask_id
    return torch.from_numpy(ids), torch.from_numpy(labels)


def random_mask(caption_ids: Tensor, mask_id: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
    """`mask_caption` with both streams drawn from `rng`."""
    return mask_caption(caption_ids, mask_id, rng.random, lambda n: rng.integers(1, mask_id, n))


def augment_caption(caption_ids: Tensor, mask_id: int, rate: float, rng: np.random.Generator) -> Tensor:
    """Change some tokens of one caption (RDE datasets/bases.py:ImageTextDataset; RDE spec 6).

    Each token with 0 < id < mask_id is chosen with probability `rate`; of the chosen ones 60 % become the mask token,
    20 % a random token, and 20 % are deleted: what follows moves up, and padding takes its place at the end.

    Args:
        caption_ids: int64 (L,), not changed.
        mask_id: the mask token; start and end of text have larger ids.
        rate: in (0, 1].
        rng: one draw for each token that may be chosen, then one for each random token.
    """
    ids = caption_ids.numpy().copy()
    eligible = np.flatnonzero((ids > 0) & (ids < mask_id))
    draws = rng.random(len(eligible)) / rate
    chosen, draws = eligible[draws < 1], draws[draws < 1]
    ids[chosen[draws < MASK_PART]] = mask_id
    random_ones = chosen[(draws >= MASK_PART) & (draws < RANDOM_PART)]
    ids[random_ones] = rng.integers(1, mask_id, len(random_ones))
    deleted = chosen[draws >= RANDOM_PART]
    return torch.from_numpy(np.pad(np.delete(ids, deleted), (0, len(deleted))))
