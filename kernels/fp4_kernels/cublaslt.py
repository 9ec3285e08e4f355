"""cuBLASLt by ctypes, for what torch's matmul cannot say.

    alpha on the device   the tensor scales of NVFP4 multiply the result, and nobody waits for them
    beta = 1, FP32 out    wgrad is added to the FP32 main gradient inside the GEMM
    scales of FP8         one factor a row (MXFP4 carried in E4M3) or a block of 128; Hopper only

The library is the one torch itself has loaded. Plans (descriptors and the heuristic's algorithm) are kept
by shape, so a call costs a dictionary lookup and one to three foreign calls. Attribute numbers are those of
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
_OUTER_VECTOR, _VECTOR_128, _BLOCK_128 = 3, 4, 5
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
    b_matrix: c_void_p
    a_matrix: c_void_p
    out: c_void_p
    heuristic: _Heuristic


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    if not torch.version.cuda:
        return None
    name = f"libcublasLt.so.{torch.version.cuda.split('.')[0]}"
    try:
        library = ctypes.CDLL(name)
    except OSError:
        return None
    pointer = c_void_p
    library.cublasLtMatmul.argtypes = [pointer] * 14 + [c_size_t, pointer]  # addresses come as ints
    library.cublasLtMatmulDescSetAttribute.argtypes = [pointer, c_int, pointer, c_size_t]
    return library


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
def _constant(value: float, device: int) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=f"cuda:{device}")


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


def _plan(a: Tensor, b: Tensor, out: Tensor, modes: tuple[int, int] | None, fast: bool) -> _Plan:
    """Column-major throughout: out.T [n, m] = b [n, k] @ a.T, with b as cuBLAS's A and a as its B."""
    lib = _library()
    device = out.device.index
    (m, k), n = a.shape, b.shape[0]
    (a_rows, lda), (b_rows, ldb) = _storage(a), _storage(b)
    desc = c_void_p()
    _check(lib.cublasLtMatmulDescCreate(byref(desc), _COMPUTE_32F, _R_32F), "MatmulDescCreate")
    _set(desc, _POINTER_MODE, c_int32(_DEVICE_POINTERS))
    _set(desc, _TRANSA, c_int32(1 if b_rows else 0))
    _set(desc, _TRANSB, c_int32(0 if a_rows else 1))
    if fast:
        _set(desc, _FAST_ACCUM, ctypes.c_int8(1))
    if modes is not None:
        _set(desc, _A_SCALE_MODE, c_int32(modes[1]))
        _set(desc, _B_SCALE_MODE, c_int32(modes[0]))
        anchor = c_void_p(_constant(1.0, device).data_ptr())
        _set(desc, _A_SCALE, anchor)
        _set(desc, _B_SCALE, anchor)
    left = _layout(b.dtype, k, n, ldb) if b_rows else _layout(b.dtype, n, k, ldb)
    right = _layout(a.dtype, k, m, lda) if a_rows else _layout(a.dtype, m, k, lda)
    result = _layout(out.dtype, n, m, out.stride(0))
    preference = c_void_p()
    _check(lib.cublasLtMatmulPreferenceCreate(byref(preference)), "MatmulPreferenceCreate")
    size = c_uint64(_WORKSPACE_BYTES)
    lib.cublasLtMatmulPreferenceSetAttribute(preference, _MAX_WORKSPACE, byref(size), c_size_t(8))
    found, heuristic = c_int(0), _Heuristic()
    status = lib.cublasLtMatmulAlgoGetHeuristic(
        _handle(device), desc, left, right, result, result, preference, 1,
        byref(heuristic), byref(found),
    )  # fmt: skip
    lib.cublasLtMatmulPreferenceDestroy(preference)
    if status or not found.value:
        types = f"{a.dtype} x {b.dtype} to {out.dtype}"
        raise CublasError(f"no algorithm for {m}x{k}x{n}, {types}, {modes=} (status {status})")
    return _Plan(desc, left, right, result, heuristic)


def _scale_mode(x: Tensor, scale: Tensor) -> int:
    """How cuBLASLt reads the factors of x [rows, k]; see ``matmul``."""
    rows, blocks = x.shape[0], -(-x.shape[1] // 128)
    if scale.shape == (rows,):
        return _OUTER_VECTOR
    # an axis of one element may have any stride
    rows_adjacent = rows == 1 or scale.stride(0) == 1
    if scale.shape == (rows, blocks) and rows_adjacent and (blocks == 1 or scale.stride(1) == rows):
        return _VECTOR_128
    if scale.shape == (-(-rows // 128), blocks) and scale.stride() == (-(-blocks // 4) * 4, 1):
        return _BLOCK_128
    raise ValueError(f"factors {list(scale.shape)}, strides {scale.stride()}, for {list(x.shape)}")


def block_layout(scale: Tensor, *, tiles: bool) -> Tensor:
    """fp32 factors of 128-blocks [rows or row tiles, k / 128] as ``matmul`` wants them to lie.

    Vectors of 1x128: rows adjacent. Tiles of 128x128: blocks adjacent, a row padded to four.
    """
    if not tiles:
        return scale.t().contiguous().t()
    rows, blocks = scale.shape
    if blocks % 4 == 0:
        return scale
    padded = scale.new_zeros((rows, -(-blocks // 4) * 4))
    padded[:, :blocks] = scale
    return padded[:, :blocks]


_PLANS: dict[tuple, _Plan | CublasError] = {}


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
        scales: fp32 factors of a and of b (float8 on Hopper): one a row [m], [n]; or one a block of 128
            along k, [m, k / 128], [n, k / 128] or [n / 128, k / 128], as ``block_layout`` lays them.
        fast_accum: FP8 products accumulated in the tensor core's own, narrower registers; not with
            blocks, whose partial sums cuBLASLt adds in FP32.

    Raises:
        CublasError: where cuBLASLt has no algorithm for it.
    """
    modes = None
    if scales is not None:
        modes = _scale_mode(a, scales[0]), _scale_mode(b, scales[1])
    key = (
        out.device.index, a.shape, a.stride(), a.dtype, b.shape, b.stride(), b.dtype,
        out.stride(0), out.dtype, modes, fast_accum,
    )  # fmt: skip
    plan = _PLANS.get(key)
    if plan is None:
        try:
            plan = _plan(a, b, out, modes, fast_accum)
        except CublasError as error:
            plan = error
        _PLANS[key] = plan
    if isinstance(plan, CublasError):
        raise plan
    if scales is not None:
        _set(plan.desc, _A_SCALE, c_void_p(scales[1].data_ptr()))
        _set(plan.desc, _B_SCALE, c_void_p(scales[0].data_ptr()))
    device: int = out.device.index
    stream = torch._C._cuda_getCurrentRawStream(device)
    one = _constant(1.0, device)
    address = out.data_ptr()
    status = _library().cublasLtMatmul(
        _handle(device), plan.desc, (one if alpha is None else alpha).data_ptr(),
        b.data_ptr(), plan.b_matrix, a.data_ptr(), plan.a_matrix,
        (one if accumulate else _constant(0.0, device)).data_ptr(),
        address, plan.out, address, plan.out, byref(plan.heuristic),
        _workspace(device, stream).data_ptr(), _WORKSPACE_BYTES, stream,
    )  # fmt: skip
    _check(status, "cublasLtMatmul")
    return out
