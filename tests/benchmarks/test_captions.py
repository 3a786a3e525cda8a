"""benchmarks/captions.py: realistic lengths, and the same vectors in both orders."""

import torch

from benchmarks.captions import encoded, random_captions
from tests.helpers.tasks import tiny_encoder


def test_lengths_and_vectors() -> None:
    torch.manual_seed(0)
    encoder = tiny_encoder().eval()
    ids = random_captions(300, 64, encoder.vocab_size)
    lengths = (ids != 0).sum(1)
    assert 27 < lengths.double().mean() < 31 and lengths.min() >= 13
    assert torch.equal(ids.argmax(1), lengths - 1)  # the end of text is the largest id and comes last
    one, other = (
        encoded(encoder, ids, order, 100, "fp32") for order in (torch.arange(300), lengths.argsort(stable=True))
    )
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
