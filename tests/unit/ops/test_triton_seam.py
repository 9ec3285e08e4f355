"""The Triton backend's edges, which need no GPU: refused shapes, what it counts, who multiplies blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fp4_kernels import cublaslt

from fp4pretrain.numerics import QuantSpec
from fp4pretrain.ops import triton_backend, triton_operand
from fp4pretrain.ops.reference import ReferenceBackend
from fp4pretrain.ops.triton_backend import TritonBackend
from fp4pretrain.ops.triton_operand import TritonOperand
from fp4pretrain.precision import Dgrad, Fprop, Recipe, Wgrad

CPU = torch.device("cpu")


def recipe_in(format_: str) -> Recipe:
    s = QuantSpec(format_)
    return Recipe(Fprop(s, s), Dgrad(s, s), Wgrad(s, s))


def test_inexact_mxfp4_is_counted_where_fp8_carries_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_backend, "_has_fp8_rows", lambda _: True)
    backend = TritonBackend()
    backend._lost_counts(CPU).copy_(torch.tensor([2**33, 5]))  # beyond 32 bits
    assert backend.counters([recipe_in("mxfp4")], CPU) == {"mxfp4_inexact": 2**33 + 5}
    assert backend.counters([recipe_in("nvfp4")], CPU) == {}
    assert TritonBackend(mxfp4_emulation="bf16").counters([recipe_in("mxfp4")], CPU) == {}
    assert ReferenceBackend().counters([recipe_in("mxfp4")], CPU) == {}


@pytest.mark.parametrize("refusing", [False, True])
def test_blocks_that_cublaslt_refuses_go_to_the_triton_kernel(
    refusing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = []

    def by_cublaslt(*_: Any, accumulate: bool, scales: Any) -> None:
        if refusing:
            raise cublaslt.CublasError("no algorithm")
        taken.append("cublaslt")

    monkeypatch.setattr(triton_operand.cublaslt, "matmul", by_cublaslt)
    monkeypatch.setattr(triton_operand, "block_matmul", lambda *_, **__: taken.append("triton"))
    a = TritonOperand(torch.zeros(128, 128), (128, 128), blocks=torch.ones(128, 1))
    out = torch.zeros(128, 128)
    for allowed in (True, False):
        triton_operand.multiply(
            a, a, out_dtype=out.dtype, out=out, fast_accum=False, blocks_by_cublaslt=allowed
        )
    assert taken == ["triton" if refusing else "cublaslt", "triton"]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.bfloat16])
@pytest.mark.parametrize("adding", [False, True])
def test_sums_are_fast_where_it_is_asked_for_and_in_fp8_alone(
    dtype: torch.dtype, adding: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = []
    monkeypatch.setattr(
        triton_operand.cublaslt, "matmul", lambda *_, **how: told.append(how["fast_accum"])
    )
    a = TritonOperand(torch.zeros(32, 32).to(dtype), (32, 32), alpha=torch.ones(()))
    out = torch.zeros(32, 32) if adding else None
    for asked in (False, True):
        triton_operand.multiply(
            a, a, out_dtype=torch.float32, out=out, fast_accum=asked, blocks_by_cublaslt=False
        )
    assert told == [False, dtype == torch.float8_e4m3fn]


def test_factors_of_blocks_lie_as_cublaslt_reads_them() -> None:
    """Vectors: rows adjacent. Tiles: blocks adjacent, rows padded to four."""
    vectors, tiles = torch.randn(256, 3), torch.randn(2, 3)
    x = torch.empty(256, 384)
    for factors, is_tiles, strides, mode in (
        (vectors, False, (1, 256), cublaslt._VECTOR_128),
        (tiles, True, (4, 1), cublaslt._BLOCK_128),
    ):
        laid = cublaslt.block_layout(factors, tiles=is_tiles)
        assert torch.equal(laid, factors)
        assert laid.stride() == strides
        assert cublaslt._scale_mode(x, laid) == mode
    for rows, k in ((200, 128), (1, 384), (1, 128), (200, 72)):  # an axis of one has any stride
        laid = cublaslt.block_layout(torch.ones(rows, -(-k // 128)), tiles=False)
        assert cublaslt._scale_mode(torch.empty(rows, k), laid) == cublaslt._VECTOR_128
    assert cublaslt._scale_mode(x, torch.ones(256)) == cublaslt._OUTER_VECTOR
    with pytest.raises(ValueError, match="factors"):
        cublaslt._scale_mode(x, vectors)
