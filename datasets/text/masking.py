"""Random changes to the tokens of a training caption: masks for masked language modelling, augmentation."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

# Masked language modelling: 15 % of the tokens are predicted. 80 % of these become the mask token, 10 % a random one.
MASK_RATE, MASK_BELOW, RANDOM_BELOW = 0.15, 0.8, 0.9
# Augmentation: of the chosen tokens, 60 % become the mask token, 20 % a random token, and 20 % are deleted.
AUGMENT_MASK_BELOW, AUGMENT_RANDOM_BELOW = 0.6, 0.8

Uniforms = Callable[[int], np.ndarray]  # n -> n floats in [0, 1)
Choices = Callable[[int], np.ndarray]  # n -> n token ids in 1..mask_id - 1


def mask_caption(caption_ids: Tensor, mask_id: int, uniforms: Uniforms, choices: Choices) -> tuple[Tensor, Tensor]:
    """Mask one caption for masked language modelling (docs/methods/irra.md#masked-captions).

    A uniform number is drawn for each token with 0 < id < mask_id, in order; padding, mask, start and end of text are
    never predicted. If no token is chosen, the first one after the start of text is masked
    (anosorae/IRRA@cfc2378:datasets/bases.py:ImageTextMLMDataset).

    Args:
        caption_ids: int64 (L,), not changed.
        mask_id: id of the mask token; start and end of text have larger ids.
        uniforms: source of the draws, one per eligible token.
        choices: source of random tokens, one per token that is replaced.

    Returns:
        mlm_ids and mlm_labels, int64 (L,). Labels are the original tokens where they are to be predicted, else 0.
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
    """`mask_caption` with both sources drawn from `rng`."""
    return mask_caption(caption_ids, mask_id, rng.random, lambda n: rng.integers(1, mask_id, n))


def augment_caption(caption_ids: Tensor, mask_id: int, rate: float, rng: np.random.Generator) -> Tensor:
    """Mask, replace or delete some tokens of one caption (docs/methods/rde.md#text-augmentation).

    Each token with 0 < id < mask_id is chosen with probability `rate`. Deletion moves the following tokens up and pads
    the end.

    Args:
        caption_ids: int64 (L,), not changed.
        mask_id: id of the mask token; start and end of text have larger ids.
        rate: probability in (0, 1].
        rng: generator of one draw per eligible token, then one per random token.
    """
    ids = caption_ids.numpy().copy()
    eligible = np.flatnonzero((ids > 0) & (ids < mask_id))
    draws = rng.random(len(eligible)) / rate
    chosen, draws = eligible[draws < 1], draws[draws < 1]
    ids[chosen[draws < AUGMENT_MASK_BELOW]] = mask_id
    random_ones = chosen[(draws >= AUGMENT_MASK_BELOW) & (draws < AUGMENT_RANDOM_BELOW)]
    ids[random_ones] = rng.integers(1, mask_id, len(random_ones))
    deleted = chosen[draws >= AUGMENT_RANDOM_BELOW]
    return torch.from_numpy(np.pad(np.delete(ids, deleted), (0, len(deleted))))
