"""cuBLASLt by ctypes, for what torch's matmul cannot say.

    alpha on the device   the tensor scales of NVFP4 multiply the result, and nobody waits for them
    beta = 1, FP32 out    wgrad is added to the FP32 main gradient inside the GEMM
    outer-vector scales   FP8 operands with one factor a row (MXFP4 carried in E4M3), Hopper only

The library is the one torch itself has loaded. Plans (descriptors and the heuristic's algorithm) are kept
by shape, so a call costs a dictionary lookup and one foreign call. Attribute numbers are those of
``cublasLt.h``; they are stable across CUDA 12 and 13.
"""

from __future__ import annotations

import ctypes
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_size_t, c_uint64, c_void_p
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

_TYPES = {
    torch.float32: 0,
    torch.float16: 2,
    torch.bfloat16: 14,
    torch.float8_e4m3fn: 28,
    torch.float8_e5m2: 29,
}
_COMPUTE_32F, _R_32F, _DEVICE_POINTERS = 68, 0, 1
_POINTER_MODE, _TRANSA, _TRANSB = 2, 3, 4
_A_SCALE, _B_SCALE, _FAST_ACCUM, _A_SCALE_MODE, _B_SCALE_MODE = 17, 18, 25, 31, 32
_OUTER_VECTOR = 3
_MAX_WORKSPACE = 1
_WORKSPACE_BYTES = 32 << 20


class _Heuristic(ctypes.Structure):
    _fields_ = (
        ("algo", c_uint64 * 8),
        ("workspace", c_size_t),
        ("state", c_int),
        ("waves", c_float),
        ("reserved", c_int * 4),
    )


class CublasError(RuntimeError):
    """cuBLASLt refused: the message names the call and its status."""


@dataclass(frozen=True)
class _Plan:
    desc: c_void_p
    a: c_void_p
    b: c_void_p
    d: c_void_p
    heuristic: _Heuristic


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    if not torch.version.cuda:
        return None
    name = f"libcublasLt.so.{torch.version.cuda.split('.')[0]}"
    try:
        return ctypes.CDLL(name)
    except OSError:
        return None


def why_missing() -> str | None:
    """None where cuBLASLt can be called, otherwise the reason in one clause."""
    if not torch.version.cuda:
        return "this torch has no CUDA"
    if _library() is None:
        return f"libcublasLt of CUDA {torch.version.cuda} was not found"
    return None


def _check(status: int, what: str) -> None:
    if status:
        raise CublasError(f"{what} returned status {status}")


@cache
def _handle(device: int) -> c_void_p:
    handle = c_void_p()
    with torch.cuda.device(device):
        _check(_library().cublasLtCreate(byref(handle)), "cublasLtCreate")
    return handle


@cache
def _workspace(device: int, stream: int) -> Tensor:
    return torch.empty(_WORKSPACE_BYTES, dtype=torch.uint8, device=f"cuda:{device}")


@cache
def _constant(value: float, device: torch.device) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=device)


def _set(desc: c_void_p, attribute: int, value: ctypes._SimpleCData) -> None:
    status = _library().cublasLtMatmulDescSetAttribute(
        desc, c_int(attribute), byref(value), c_size_t(ctypes.sizeof(value))
    )
    _check(status, f"setting attribute {attribute} of a matmul")


def _layout(dtype: torch.dtype, rows: int, cols: int, ld: int) -> c_void_p:
    layout = c_void_p()
    status = _library().cublasLtMatrixLayoutCreate(
        byref(layout), c_int(_TYPES[dtype]), c_uint64(rows), c_uint64(cols), c_int64(ld)
    )
    _check(status, "cublasLtMatrixLayoutCreate")
    return layout


def _storage(x: Tensor) -> tuple[bool, int]:
    """(whether the last axis is the adjacent one, leading dimension) of a matrix."""
    if x.stride(1) == 1:
        return True, x.stride(0)
    if x.stride(0) == 1:
        return False, x.stride(1)
    raise ValueError(f"a GEMM operand needs a unit stride, got {x.stride()}")


@lru_cache(maxsize=1024)
def _plan(
    device: int,
    shape: tuple[int, int, int],
    dtypes: tuple,
    storage: tuple,
    scaled: bool,
    fast: bool,
) -> _Plan:
    """Column-major throughout: out.T [n, m] = b [n, k] @ a.T, with b as cuBLAS's A and a as its B."""
    lib = _library()
    m, n, k = shape
    (a_rows, lda), (b_rows, ldb), ldd = storage
    desc = c_void_p()
    _check(lib.cublasLtMatmulDescCreate(byref(desc), _COMPUTE_32F, _R_32F), "MatmulDescCreate")
    _set(desc, _POINTER_MODE, c_int32(_DEVICE_POINTERS))
    _set(desc, _TRANSA, c_int32(1 if b_rows else 0))
    _set(desc, _TRANSB, c_int32(0 if a_rows else 1))
    if fast:
        _set(desc, _FAST_ACCUM, ctypes.c_int8(1))
    if scaled:
        _set(desc, _A_SCALE_MODE, c_int32(_OUTER_VECTOR))
        _set(desc, _B_SCALE_MODE, c_int32(_OUTER_VECTOR))
        anchor = c_void_p(_constant(1.0, torch.device("cuda", device)).data_ptr())
        _set(desc, _A_SCALE, anchor)
        _set(desc, _B_SCALE, anchor)
    left = _layout(dtypes[1], k, n, ldb) if b_rows else _layout(dtypes[1], n, k, ldb)
    right = _layout(dtypes[0], k, m, lda) if a_rows else _layout(dtypes[0], m, k, lda)
    out = _layout(dtypes[2], n, m, ldd)
    preference = c_void_p()
    _check(lib.cublasLtMatmulPreferenceCreate(byref(preference)), "MatmulPreferenceCreate")
    size = c_uint64(_WORKSPACE_BYTES)
    lib.cublasLtMatmulPreferenceSetAttribute(preference, _MAX_WORKSPACE, byref(size), c_size_t(8))
    found, heuristic = c_int(0), _Heuristic()
    status = lib.cublasLtMatmulAlgoGetHeuristic(
        _handle(device), desc, left, right, out, out, preference, 1, byref(heuristic), byref(found)
    )
    lib.cublasLtMatmulPreferenceDestroy(preference)
    if status or not found.value:
        raise CublasError(f"no algorithm for {shape}, {dtypes}, scaled={scaled} (status {status})")
    return _Plan(desc, left, right, out, heuristic)


def matmul(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    alpha: Tensor | None = None,
    accumulate: bool = False,
    scales: tuple[Tensor, Tensor] | None = None,
    fast_accum: bool = False,
) -> Tensor:
    """``out = alpha * a @ b.T (+ out)``.

    Args:
        a: [m, k], b: [n, k]: bfloat16, float16 or float8 (then both with k adjacent); any unit stride.
        out: [m, n] float32 or bfloat16, rows adjacent.
        alpha: fp32 scalar on the device; None for 1.
        accumulate: add to out.
        scales: fp32 factors of a's rows [m] and of b's rows [n] (float8 on Hopper).
        fast_accum: FP8 products accumulated in the tensor core's own, narrower registers.

    Raises:
        CublasError: where cuBLASLt has no algorithm for it.
    """
    device = out.device.index
    plan = _plan(
        device,
        (a.shape[0], b.shape[0], a.shape[1]),
        (a.dtype, b.dtype, out.dtype),
        (_storage(a), _storage(b), out.stride(0)),
        scales is not None,
        fast_accum,
    )
    if scales is not None:
        _set(plan.desc, _A_SCALE, c_void_p(scales[1].data_ptr()))
        _set(plan.desc, _B_SCALE, c_void_p(scales[0].data_ptr()))
    stream = torch.cuda.current_stream(out.device).cuda_stream
    if alpha is None:
        alpha = _constant(1.0, out.device)
    beta = _constant(1.0 if accumulate else 0.0, out.device)
    workspace = _workspace(device, stream)
    d = c_void_p(out.data_ptr())
    status = _library().cublasLtMatmul(
        _handle(device), plan.desc,
        c_void_p(alpha.data_ptr()), c_void_p(b.data_ptr()), plan.a, c_void_p(a.data_ptr()), plan.b,
        c_void_p(beta.data_ptr()), d, plan.d, d, plan.d, byref(plan.heuristic),
        c_void_p(workspace.data_ptr()), c_size_t(_WORKSPACE_BYTES), c_void_p(stream),
    )  # fmt: skip
    _check(status, "cublasLtMatmul")
    return out
