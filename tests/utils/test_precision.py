"""Number formats: the precision of float32 products holds inside its context only."""

import pytest
import torch

from utils.precision import matmul_precision


def test_the_precision_of_products_is_restored_after_errors_too() -> None:
    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError), matmul_precision("medium"):
        assert torch.get_float32_matmul_precision() == "medium"
        raise KeyError
    assert torch.get_float32_matmul_precision() == before == "highest"
