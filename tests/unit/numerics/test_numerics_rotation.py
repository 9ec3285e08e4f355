"""The rotation is orthogonal, cancels in a product, and its order of operations is fixed."""

from __future__ import annotations

import math

import pytest
import torch

from fp4pretrain.errors import UserError
from fp4pretrain.numerics import derive_key, hadamard_matrix, random_signs, rotate, signs_te

SIZES = [16, 32, 64, 128]


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("size", SIZES)
def test_the_matrix_is_sylvesters(size: int) -> None:
    h = hadamard_matrix(size)
    signs = [[(-1) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    assert torch.equal(h.sign(), torch.tensor(signs).float())
    assert torch.allclose(h @ h.t(), torch.eye(size), atol=1e-6)
    assert torch.allclose(h.abs(), torch.full_like(h, size**-0.5))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("signed", [False, True])
def test_rotate_is_a_product_with_signs_and_h(size: int, signed: bool) -> None:
    x = normal(130, 6 * size)
    signs = torch.tensor(random_signs(derive_key(size), size)).float()
    h = hadamard_matrix(size).double()
    matrix = signs.double()[:, None] * h if signed else h
    expected = (x.double().view(-1, size) @ matrix).view_as(x)
    got = rotate(x, size=size, signs=signs if signed else None, round_bf16=False)
    assert got.dtype == torch.float32
    assert (got - expected).abs().max() < 4e-6  # log2(128) + 2 roundings of numbers below 6
    rounded = rotate(x, size=size, signs=signs if signed else None)
    assert rounded.dtype == torch.bfloat16 and torch.equal(rounded, got.bfloat16())


@pytest.mark.parametrize("size", SIZES)
def test_the_order_of_operations_bit_for_bit(size: int) -> None:
    """One row of scalar butterflies: stride 1, 2, 4, ..., then the factor."""
    x = normal(1, size)
    signs = random_signs(derive_key(1), size)
    row = [x[0, i] * signs[i] for i in range(size)]
    stride = 1
    while stride < size:
        for i in range(size):
            if not i & stride:
                row[i], row[i + stride] = row[i] + row[i + stride], row[i] - row[i + stride]
        stride *= 2
    expected = torch.stack(row) * torch.tensor(1 / math.sqrt(size))
    assert torch.equal(rotate(x, size=size, signs=signs, round_bf16=False)[0], expected)


@pytest.mark.parametrize("size", SIZES)
def test_it_keeps_lengths_and_cancels_in_the_product(size: int) -> None:
    a, b = normal(24, 256).double().float(), normal(256, 40).t()
    signs = random_signs(derive_key(2), size)
    a_r, b_r = (rotate(t, size=size, signs=signs, round_bf16=False) for t in (a, b))
    assert torch.allclose(a_r.norm(dim=1), a.norm(dim=1), rtol=1e-5)
    assert torch.allclose(a_r @ b_r.t(), a @ b.t(), atol=2e-4)
    half = rotate(a, size=size, signs=signs, round_bf16=False) @ b.t()
    assert not torch.allclose(half, a @ b.t(), atol=1.0)


def test_it_spreads_an_outlier() -> None:
    x = torch.zeros(1, 64)
    x[0, 5] = 16.0
    assert rotate(x, size=64).abs().tolist() == [[2.0] * 64]


@pytest.mark.parametrize("shape", [(4096, 32), (3, 2048), (130, 528)])
def test_layout_and_tiling_change_nothing(shape: tuple[int, int]) -> None:
    x = normal(*shape)
    expected = torch.stack([rotate(row[None], size=16)[0] for row in x[:3]])
    assert torch.equal(rotate(x, size=16)[:3], expected)
    x_t = x.t().contiguous().t()
    assert not x_t.is_contiguous() and torch.equal(rotate(x_t, size=16), rotate(x, size=16))
    assert torch.equal(rotate(x.bfloat16(), size=16), rotate(x.bfloat16().float(), size=16))


def test_te_signs() -> None:
    assert "".join("+" if s > 0 else "-" for s in signs_te()) == "+++-+------+-+--"


@pytest.mark.parametrize("size, cols", [(8, 64), (48, 96), (256, 256), (64, 96)])
def test_sizes_that_cannot_be_are_refused(size: int, cols: int) -> None:
    with pytest.raises(UserError, match="^rotation.size: .*; use"):
        rotate(torch.ones(2, cols), size=size)
