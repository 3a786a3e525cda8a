"""Masked language loss: the authors' values and gradients."""

import numpy as np
import torch

from model.objectives.masked_language import mlm_loss
from tests.helpers.golden import assert_gradient, leaf


def test_mlm_loss_is_the_authors(irra_golden: dict[str, np.ndarray]) -> None:
    scores, labels = leaf(irra_golden["case0/mlm_scores"]), torch.from_numpy(irra_golden["case0/mlm_labels"])
    loss = mlm_loss(scores, labels)
    np.testing.assert_allclose(float(loss.detach()), irra_golden["case0/mlm"], rtol=2e-5)
    loss.backward()
    assert_gradient(scores.grad, irra_golden["case0/mlm__grad_scores"])
    accuracy = (scores.argmax(1) == labels)[labels != 0].float().mean()
    np.testing.assert_allclose(float(accuracy), irra_golden["case0/mlm_acc"], rtol=1e-6)
