"""Model FLOPs utilisation: what a pass's products with weights need, as a share of what the device could do meanwhile.

Counted as usual (PaLM, arXiv 2204.02311, appendix B): two operations for each weight that a row meets going forward and
twice as many going back, attention left out. What is computed again for activation checkpointing counts once.
"""

import torch

from trainer.draft import Draft
from trainer.roots import Roots

# Of dense matrix products in bfloat16, by NVIDIA's data sheets; the first name that is part of the device's holds.
_PEAK_FLOPS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12,
    "L40S": 362e12,
}  # fmt: skip


def pass_flops(draft: Draft, roots: Roots, steps: int, taught: int, learnt: int, head_weights: int) -> int:
    """Forward and backward: ``taught`` rows go through the target's head, ``learnt`` of them teach each step's draft.

    Zero where the draft does not say what its products are.
    """
    if not (own := draft.products(roots.rows, roots.count, steps)):
        return 0
    return 6 * (own + steps * learnt * draft.lm_head.weight.numel()) + 2 * taught * head_weights


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Operations a second, or None where they are not known: of other types and devices."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in _PEAK_FLOPS.items() if known in name), None)
