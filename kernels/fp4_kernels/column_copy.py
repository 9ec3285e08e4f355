"""A column copy of a tile: a copy of the transpose, its blocks along the tokens.

A block of sixteen tokens is one register of each of the sixteen tensors, so amax, rotation, rounding and
packing move nothing between threads; only finished words (eight 4-bit codes, four bytes or two bfloat16)
are exchanged, to be stored along the tokens.
"""

import triton
import triton.language as tl

from fp4_kernels.arith import round_bf16, widen
from fp4_kernels.copies import (
    AMAX,
    BLOCK,
    OUT,
    ROTATED_BF16,
    ROTATION,
    SIGNS,
    TWO_D,
    block_scales,
    tensor_scales,
    to_tile,
)
from fp4_kernels.elements import (
    far_blocks,
    inexact,
    join_words,
    noise_words,
    output_words,
    row_factor,
    store,
)
from fp4_kernels.rotation import finish, hadamard_tokens


@triton.jit
def _values(xs, signs, CFG: tl.constexpr, FAST: tl.constexpr):
    """The tile in fp32, rotated along the tokens where the copy is."""
    vs = ()
    for i in tl.static_range(16):
        vs = vs + (widen(xs[i], FAST),)
    if CFG[ROTATION] > 0:
        SIZE: tl.constexpr = CFG[ROTATION]
        ROUND: tl.constexpr = CFG[ROTATED_BF16]
        FOLD: tl.constexpr = (SIZE == 16 or SIZE == 64) and xs[0].dtype != tl.float32
        hs = hadamard_tokens(vs, signs[0], signs[1], SIZE, tl.constexpr(CFG[SIGNS]), FOLD)
        vs = ()
        for i in tl.static_range(16):
            if not FOLD:
                vs = vs + (finish(hs[i], SIZE, ROUND, FAST),)
            elif ROUND:
                vs = vs + (round_bf16(hs[i], FAST),)
            else:
                vs = vs + (hs[i],)
    return vs


@triton.jit
def _store_scales(stored, amax_row, n, geo, ptr, CFG: tl.constexpr, EVEN: tl.constexpr):
    """Scales of blocks, transposed, or what a whole row of the copy shares, by the first tokens."""
    m0, n0, R, C = geo
    L: tl.constexpr = CFG[BLOCK]
    if CFG[AMAX] == "row":
        value = stored
        if CFG[OUT] == "e4m3":
            value = row_factor(amax_row, CFG)
        tl.store(ptr[1] + n, value, mask=n < tl.where(m0 == 0, C, 0))
    elif CFG[OUT] == "codes" and L > 0:
        token = m0 // L + tl.arange(0, stored.shape[0])[None, :]
        H: tl.constexpr = L if CFG[TWO_D] else 1
        feature = n0 // H + tl.arange(0, stored.shape[1])[:, None]
        inside = (feature * H < C) & (token * L < R)
        store(ptr[1] + feature.to(tl.int64) * (R // L) + token, tl.trans(stored), inside, EVEN)


@triton.jit
def _store_words(ws, geo, out_ptr, EVEN: tl.constexpr):
    """Words [TB, BN], the tuple's index running fastest along the tokens, to [columns, tokens]."""
    TB: tl.constexpr = ws[0].shape[0]
    BN: tl.constexpr = ws[0].shape[1]
    W: tl.constexpr = len(ws)
    m0, n0, R, C = geo
    w = tl.reshape(join_words(ws), [TB, BN, W])
    w = tl.reshape(tl.permute(w, (1, 0, 2)), [BN, TB * W])
    n = n0 + tl.arange(0, BN)[:, None]
    t = m0 // 16 * W + tl.arange(0, TB * W)[None, :]
    inside = (n < C) & (t < R // 16 * W)
    store(out_ptr + n.to(tl.int64) * (R // 16 * W) + t, w, inside, EVEN)


@triton.jit
def _prepare(xs, n, geo, ptr, signs, CFG: tl.constexpr, FAST: tl.constexpr):
    """(values, amax a row, amax a block, stored, decode, encode)."""
    scales_t = tensor_scales(ptr[2], CFG)
    amax_row = scales_t[0]
    if CFG[AMAX] == "row":
        amax_row = tl.load(ptr[2] + n, mask=n < geo[3], other=0.0)
    vs = _values(xs, signs, CFG, FAST)
    amax_b, stored, decode, encode = block_scales(vs, amax_row, scales_t, 0, CFG, FAST)
    return vs, amax_row, amax_b, stored, decode, encode


@triton.jit
def column_copy(
    xs, geo, ptr, noise, signs, CFG: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr
):
    """Quantize the tile's transpose."""
    TB: tl.constexpr = xs[0].shape[0]
    BN: tl.constexpr = xs[0].shape[1]
    m0, n0, _, _ = geo
    n = n0 + tl.arange(0, BN)[None, :]
    vs, amax_row, amax_b, stored, decode, encode = _prepare(xs, n, geo, ptr, signs, CFG, FAST)
    _store_scales(stored, amax_row, n, geo, ptr, CFG, EVEN)
    tile = (to_tile(stored, 0, CFG), to_tile(decode, 0, CFG), to_tile(encode, 0, CFG))
    words = noise_words(n, m0 // 16 + tl.arange(0, TB)[:, None], noise, tile[0], CFG)
    if CFG[OUT] == "e4m3":
        far = far_blocks(to_tile(amax_b, 0, CFG), tile[0], amax_row, CFG)
        if tl.max(tl.max(far, axis=1), axis=0) > 0:
            lost = inexact(vs, words, tile[2], tile[0], amax_row, CFG, FAST)
            tl.atomic_add(ptr[3], tl.sum(tl.sum(lost, axis=1), axis=0))
    _store_words(output_words(vs, words, tile, amax_row, CFG, FAST), geo, ptr[0], EVEN)
