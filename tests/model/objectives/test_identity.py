"""Identity loss: the authors' values and gradients, and a loop shared with masked language modelling."""

import math

import numpy as np
import pytest
import torch

from model.objectives.identity import id_loss
from model.objectives.masked_language import mlm_loss
from tests.helpers.golden import assert_gradient, leaf
from tests.helpers.loops import softmax


def test_id_loss_is_the_authors(irra_golden: dict[str, np.ndarray]) -> None:
    image, text = leaf(irra_golden["case0/id_img_logits"]), leaf(irra_golden["case0/id_txt_logits"])
    loss = id_loss(image, text, torch.from_numpy(irra_golden["case0/pids"]))
    np.testing.assert_allclose(float(loss.detach()), irra_golden["case0/id"], rtol=2e-5)
    loss.backward()
    assert_gradient(image.grad, irra_golden["case0/id__grad_img_logits"])
    assert_gradient(text.grad, irra_golden["case0/id__grad_txt_logits"])


def test_id_and_mlm_losses_equal_explicit_loops() -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(6, 9, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([3, 0, 8, 0, 1, 3])
    rows = [(scores.tolist(), label) for logits in (image, text) for scores, label in zip(logits, labels, strict=True)]
    expected = sum(-math.log(softmax(scores)[label]) for scores, label in rows) / len(rows)
    assert float(id_loss(image, text, labels)) == pytest.approx(expected, rel=1e-10)
    predicted = [(scores, label) for scores, label in rows[:6] if label != 0]  # label 0: not predicted
    expected = sum(-math.log(softmax(scores)[label]) for scores, label in predicted) / len(predicted)
    assert float(mlm_loss(image, labels)) == pytest.approx(expected, rel=1e-10)
