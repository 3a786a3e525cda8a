"""Published peak rates of GPUs, for the fraction of them that training reaches (MFU).

Dense products, in TFLOP/s. Sources, NVIDIA's data sheets and white papers (half of the numbers "with sparsity"):

- H100, H200: https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet,
  https://www.nvidia.com/en-us/data-center/h100/, https://www.nvidia.com/en-us/data-center/h200/
- A100: https://www.nvidia.com/en-us/data-center/a100/
- L40S: https://www.nvidia.com/en-us/data-center/l40s/
- RTX 4090: https://images.nvidia.com/aem-dam/Solutions/geforce/ada/nvidia-ada-gpu-architecture.pdf, appendix A
- RTX 3090: https://www.nvidia.com/content/PDF/nvidia-ampere-ga-102-gpu-architecture-whitepaper-v2.pdf, table 9
- V100: https://images.nvidia.com/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf
- T4: https://www.nvidia.com/en-us/data-center/tesla-t4/
"""

import re

SLOWER = " (Ti|D|SUPER|Laptop)"  # or faster than the device that is named alike
# Part of torch's name of the device -> peaks of fp16 and bf16, TF32, and fp32. The first match counts.
PEAKS: dict[str, dict[str, float]] = {
    "H200": {"fp16": 989.5, "bf16": 989.5, "tf32": 494.7, "fp32": 67},
    "H100 PCIe": {"fp16": 756, "bf16": 756, "tf32": 378, "fp32": 51},
    "H100 NVL": {"fp16": 835.5, "bf16": 835.5, "tf32": 417.5, "fp32": 60},
    "H100": {"fp16": 989.5, "bf16": 989.5, "tf32": 494.7, "fp32": 67},
    "A100": {"fp16": 312, "bf16": 312, "tf32": 156, "fp32": 19.5},
    "L40S": {"fp16": 362, "bf16": 362, "tf32": 183, "fp32": 91.6},
    "RTX 4090": {"fp16": 165.2, "bf16": 165.2, "tf32": 82.6, "fp32": 82.6},
    "RTX 3090": {"fp16": 71, "bf16": 71, "tf32": 35.6, "fp32": 35.6},
    "V100-PCIE": {"fp16": 112, "fp32": 14},
    "V100": {"fp16": 125, "fp32": 15.7},
    "T4": {"fp16": 65, "fp32": 8.1},
}


def peak_flops(device: str, precision: str, matmul: str = "highest") -> float | None:
    """Peak rate in FLOP/s of a device by torch's name; None if it is not listed.

    Args:
        device: name, such as NVIDIA A100-SXM4-80GB.
        precision: fp32, bf16 or fp16.
        matmul: precision of products in fp32; all but `highest` are TF32 where the device has it.
    """
    rates = next((rates for name, rates in PEAKS.items() if re.search(rf"\b{name}\b(?!{SLOWER})", device)), {})
    if precision == "fp32" and matmul != "highest" and "tf32" in rates:
        precision = "tf32"
    return 1e12 * rates[precision] if precision in rates else None
