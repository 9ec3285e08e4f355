"""Tokens a second, model FLOPs utilization (MFU), and memory.

FLOPs of one token of training, forward and backward (PaLM, arXiv 2204.02311, appendix B)::

    6 * (parameters - input embedding) + 12 * layers * attention width * sequence length

Each parameter that multiplies costs 2 FLOPs forward and 4 backward; looking up the input embedding
multiplies nothing. The second term is the two attention products over the whole sequence, the
causal half not subtracted. MFU divides by the dense BF16 peak for every recipe, so an FP8 or FP4
run may exceed what BF16 could reach, and two recipes' MFUs compare as their speeds do.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import psutil
import torch

# Dense BF16 FLOP/s from the vendors' data sheets. The first pattern found in the device's name
# counts, so the variants with another clock or power limit stand before their family.
_PEAKS: tuple[tuple[str, float], ...] = (
    (r"\bGB200\b", 2500e12),
    (r"\bB200\b", 2250e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH100 NVL\b", 835e12),
    (r"\bG?H[12]00\b", 989e12),
    (r"\bA100\b", 312e12),
    (r"\bMI300X\b", 1307e12),
    (r"\bMI355X\b", 2500e12),
)


def peak_flops(device: torch.device) -> float | None:
    """Dense BF16 FLOP/s of a device; None for a CPU and for a GPU that the table does not know."""
    if device.type != "cuda":
        return None
    return peak_flops_by_name(torch.cuda.get_device_name(device))


def peak_flops_by_name(name: str) -> float | None:
    """Dense BF16 FLOP/s of a GPU by its name (``"NVIDIA H100 80GB HBM3"``), None when unknown."""
    return next((peak for pattern, peak in _PEAKS if re.search(pattern, name)), None)


def flops_per_token(
    *, parameters: int, input_embedding: int, layers: int, attention_width: int, seq_length: int
) -> int:
    """Training FLOPs of one token; see the head of this file.

    ``parameters`` counts the whole model (all ranks), ``input_embedding`` those that are only
    looked up: 0 where the embedding is tied to the head, which multiplies by it.
    ``attention_width`` is heads times head size, the hidden size in most models.
    """
    return 6 * (parameters - input_embedding) + 12 * layers * attention_width * seq_length


def memory_gib(device: torch.device) -> float:
    """Peak GPU memory that PyTorch allocated, or this process's resident set on a CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return float(psutil.Process().memory_info().rss) / 2**30


class Throughput:
    """Tokens a second of the whole run and its MFU, between one report and the next.

    ``flops`` is ``flops_per_token``'s number, ``peak`` the FLOP/s of one device (None: MFU is
    null), ``devices`` their count. The caller reports where the device has caught up, which
    reading the loss does.
    """

    def __init__(
        self,
        *,
        flops: float,
        peak: float | None,
        devices: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._flops = flops
        self._peak = None if peak is None else peak * devices
        self._clock = clock
        self._start = clock()

    def report(self, tokens: int) -> dict[str, float | None]:
        """Rates over ``tokens``, all ranks', trained on since the last report."""
        now = self._clock()
        rate = tokens / (now - self._start)
        self._start = now
        mfu = None if self._peak is None else rate * self._flops / self._peak
        return {"tokens_per_second": rate, "mfu": mfu}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time spent inside: evaluation, writing a checkpoint."""
        before = self._clock()
        yield
        self._start += self._clock() - before
