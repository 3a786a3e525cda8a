"""Fields of a batch: the mask of caption tokens."""

import torch

from utils.batch import caption_mask


def test_padding_is_what_follows_the_last_token() -> None:
    ids = torch.tensor([[98, 5, 0, 7, 99, 0], [98, 99, 0, 0, 0, 0], [0] * 6, [98, 1, 2, 3, 4, 99]])  # 0 can be a token
    assert caption_mask(ids).sum(dim=1).tolist() == [5, 2, 1, 6]
    assert caption_mask(ids)[:, 0].all()
