"""What the device at hand can do."""

from __future__ import annotations

from functools import cache

import torch


@cache
def has_fast_casts(device: torch.device) -> bool:
    """Whether the FP8 and paired BF16 conversions of NVIDIA's sm_89 and later are there."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)
