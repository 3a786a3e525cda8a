"""utils/peaks.py: published rates by the name of a device."""

import pytest

from utils.peaks import peak_flops


@pytest.mark.parametrize(
    "device, precision, tera",
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.5),
        ("NVIDIA H100 PCIe", "fp16", 756),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312),
        ("NVIDIA A100-SXM4-80GB", "fp32", 19.5),
        ("NVIDIA GeForce RTX 3090", "bf16", 71),
        ("NVIDIA GeForce RTX 3090 Ti", "bf16", None),
        ("Tesla T4", "fp16", 65),
        ("Tesla T4", "bf16", None),
        ("Some device", "bf16", None),
    ],
)
def test_the_peak_of_a_device(device: str, precision: str, tera: float | None) -> None:
    assert peak_flops(device, precision) == (None if tera is None else tera * 1e12)


def test_tf32_counts_where_it_is_switched_on() -> None:
    assert peak_flops("NVIDIA A100-SXM4-80GB", "fp32", "high") == 156e12
    assert peak_flops("Tesla T4", "fp32", "high") == 8.1e12
