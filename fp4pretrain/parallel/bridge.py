"""megatron-core on a machine without CUDA: the only place that patches anything.

megatron-core names CUDA in five ways that a CPU cannot serve. Each is mapped here, with its reason,
and only when the run's device is the CPU; on GPUs this module does nothing at all.
"""

from __future__ import annotations

import functools
import logging
import sys
from contextlib import nullcontext
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


class _CudaNamesMeanCpu(TorchFunctionMode):
    """Maps what megatron-core says of CUDA tensors to CPU tensors.

    - Factories get ``device="cuda"`` (schedules, optimizer, grad buffers).
    - ``tensor.cuda()`` (RoPE, optimizer state) is the identity.
    - ``tensor.type()`` is compared with ``"torch.cuda.FloatTensor"`` (clip_grads and the optimizers
      sort parameters by it), so the string says cuda.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is not None and "cuda" in str(device):
            kwargs["device"] = _CPU
        if func is torch.Tensor.cuda:
            return args[0]
        result = func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return result.replace("torch.", "torch.cuda.")
        return result


class _NoStream:
    """Stands in for a CUDA stream: CPU work is already in order."""

    def wait_stream(self, other: object) -> None:
        pass

    def synchronize(self) -> None:
        pass


_mode: _CudaNamesMeanCpu | None = None


def run_on_cpu() -> None:
    """Point megatron-core's CUDA calls at the CPU, for the life of this process (idempotent)."""
    global _mode
    if _mode is not None:
        return
    _mode = _CudaNamesMeanCpu()
    _mode.__enter__()

    # device=torch.cuda.current_device() is how most of megatron-core places tensors.
    torch.cuda.current_device = lambda: _CPU  # type: ignore[assignment, return-value]
    torch.cuda.set_device = lambda device: None  # type: ignore[assignment]
    torch.cuda.synchronize = lambda device=None: None  # type: ignore[assignment]
    # The gradient buckets wait on streams before and after a collective.
    torch.cuda.current_stream = lambda device=None: _NoStream()  # type: ignore[assignment, return-value]
    torch.cuda.default_stream = lambda device=None: _NoStream()  # type: ignore[assignment, return-value]
    torch.cuda.stream = lambda stream: nullcontext()  # type: ignore[assignment, return-value]

    _take_torchs_optimizer()

    # The RNG tracker saves and restores the CUDA generator around dropout and recompute; here the
    # CPU generator is that generator.
    from megatron.core.tensor_parallel import random as megatron_random

    torch.cuda.manual_seed = torch.manual_seed  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()  # type: ignore[assignment]
    megatron_random._get_cuda_rng_state = lambda *a, **k: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, *a, **k: torch.set_rng_state(state)
    # ... so the tracker's warning that the CPU generator moved inside a fork is expected.
    megatron_random_log = logging.getLogger(megatron_random.__name__)
    megatron_random_log.addFilter(lambda record: "CPU RNG state changed" not in record.getMessage())


def _take_torchs_optimizer() -> None:
    """Transformer Engine's and apex's Adam, norms and copies, which megatron-core prefers where they are
    installed, are CUDA kernels."""
    from megatron.core import optimizer, utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer

    optimizer.USING_PYTORCH_OPTIMIZER = True
    for where in ("HAVE_APEX_OR_TE", "USING_TE_OPTIMIZER", "USING_APEX_OPTIMIZER"):
        setattr(distrib_optimizer, where, False)  # where its state counts the steps
    copying: Any = sys.modules["megatron.core.optimizer.optimizer"]  # a name of the package's too
    for module in (clip_grads, copying):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm


def plain_torch(function: Any) -> Any:
    """Run ``function`` outside the mode above: for code of ours that runs many small operations and
    never names CUDA, since the mode costs microseconds an operation."""

    @functools.wraps(function)
    def without_mode(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return without_mode
