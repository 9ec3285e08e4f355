"""A row copy of a tile: blocks along the columns.

A thread takes whole blocks of sixteen columns, as two loads of eight: nothing is exchanged between
threads for a scale, and the sixteen bytes of noise of one Philox call are used where they are drawn. The
tile is taken in parts of a few tokens. Beside a column copy that comes first, the parts are read again
from the cache in a loop, which keeps the code small enough for the instruction cache; alone, all loads are
issued at once.
"""

import triton
import triton.language as tl

from fp4_kernels.arith import widen
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
from fp4_kernels.rotation import finish, hadamard_columns, join16, split16

# Elements of a part: sixteen for each of 128 threads.
PART = tl.constexpr(2048)


@triton.jit
def load_blocks(x_ptr, stride, m0, geo, BM: tl.constexpr, NB: tl.constexpr, EVEN: tl.constexpr):
    """The lower and the upper eight columns [BM, NB, 8] of NB blocks of BM tokens; zeros outside."""
    _, n0, R, C = geo
    m = m0 + tl.arange(0, BM)[:, None, None]
    n = n0 + tl.arange(0, NB)[None, :, None] * 16 + tl.arange(0, 8)[None, None, :]
    offset = m.to(tl.int64) * stride + n
    if EVEN:
        return tl.load(x_ptr + offset), tl.load(x_ptr + offset + 8)
    else:
        inside = (m < R) & (n < C)
        lower = tl.load(x_ptr + offset, mask=inside, other=0.0)
        return lower, tl.load(x_ptr + offset + 8, mask=inside, other=0.0)


@triton.jit
def _values(halves, signs, CFG: tl.constexpr, FAST: tl.constexpr):
    """Sixteen fp32 [BM, NB], one a place in the block, rotated where the copy is."""
    vs = split16(widen(halves[0], FAST), widen(halves[1], FAST))
    if CFG[ROTATION] > 0:
        v = hadamard_columns(
            join16(vs), signs[0], signs[1], tl.constexpr(CFG[ROTATION]), tl.constexpr(CFG[SIGNS])
        )
        v = finish(v, tl.constexpr(CFG[ROTATION]), tl.constexpr(CFG[ROTATED_BF16]), FAST)
        A: tl.constexpr = vs[0].shape[0]
        B: tl.constexpr = vs[0].shape[1]
        lower, upper = tl.split(tl.permute(tl.reshape(v, [A, B, 2, 8]), (0, 1, 3, 2)))
        vs = split16(lower, upper)
    return vs


@triton.jit
def _amax_row(m, R, scales_t, ptr, CFG: tl.constexpr):
    if CFG[AMAX] == "row":
        return tl.load(ptr[2] + m, mask=m < R, other=0.0)
    else:
        return scales_t[0]


@triton.jit
def _store_scales(stored, amax_row, m0, geo, ptr, CFG: tl.constexpr, EVEN: tl.constexpr):
    """Scales of blocks [BM, NB] (2d: of tiles), or what a whole row shares, by the first columns."""
    _, n0, R, C = geo
    L: tl.constexpr = CFG[BLOCK]
    if CFG[AMAX] == "row":
        m = m0 + tl.arange(0, amax_row.shape[0])[:, None]
        value = stored
        if CFG[OUT] == "e4m3":
            value = row_factor(amax_row, CFG)
        tl.store(ptr[1] + m, value, mask=m < tl.where(n0 == 0, R, 0))
    elif CFG[OUT] == "codes" and L > 0:
        H: tl.constexpr = L if CFG[TWO_D] else 1
        a = m0 // H + tl.arange(0, stored.shape[0])[:, None]
        b = n0 // L + tl.arange(0, stored.shape[1])[None, :]
        inside = (a * H < R) & (b * L < C)
        store(ptr[1] + a.to(tl.int64) * (C // L) + b, stored, inside, EVEN)


@triton.jit
def _store_words(ws, m0, geo, out_ptr, EVEN: tl.constexpr):
    """Words [BM, NB], the tuple's index running fastest along the columns, to [tokens, columns]."""
    BM: tl.constexpr = ws[0].shape[0]
    NB: tl.constexpr = ws[0].shape[1]
    W: tl.constexpr = len(ws)
    _, n0, R, C = geo
    w = tl.reshape(join_words(ws), [BM, NB * W])
    m = m0 + tl.arange(0, BM)[:, None]
    n = n0 // 16 * W + tl.arange(0, NB * W)[None, :]
    inside = (m < R) & (n < C // 16 * W)
    store(out_ptr + m.to(tl.int64) * (C // 16 * W) + n, w, inside, EVEN)


@triton.jit
def _scaled(halves, m0, geo, ptr, scales_t, signs, CFG: tl.constexpr, FAST: tl.constexpr):
    """Tokens [BM, 1] of a part, their amaxes, their values, and what ``block_scales`` returns."""
    m = m0 + tl.arange(0, halves[0].shape[0])[:, None]
    amax_row = _amax_row(m, geo[2], scales_t, ptr, CFG)
    vs = _values(halves, signs, CFG, FAST)
    return m, amax_row, vs, block_scales(vs, amax_row, scales_t, 1, CFG, FAST)


@triton.jit
def _part(
    halves, m0, geo, ptr, scales_t, noise, signs,
    CFG: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Quantize one part. Returns int32 [BM, NB] of ``far_blocks`` (OUT e4m3)."""
    BM: tl.constexpr = halves[0].shape[0]
    NB: tl.constexpr = halves[0].shape[1]
    m, amax_row, vs, scales = _scaled(halves, m0, geo, ptr, scales_t, signs, CFG, FAST)
    amax_b, stored, decode, encode = scales
    _store_scales(stored, amax_row, m0, geo, ptr, CFG, EVEN)
    tile = (to_tile(stored, 1, CFG), to_tile(decode, 1, CFG), to_tile(encode, 1, CFG))
    words = noise_words(m, geo[1] // 16 + tl.arange(0, NB)[None, :], noise, tile[0], CFG)
    _store_words(output_words(vs, words, tile, amax_row, CFG, FAST), m0, geo, ptr[0], EVEN)
    if CFG[OUT] == "e4m3":
        return far_blocks(to_tile(amax_b, 1, CFG), tile[0], amax_row, CFG)
    else:
        return tl.zeros([BM, NB], tl.int32)


@triton.jit
def _count(halves, m0, geo, ptr, scales_t, noise, signs, CFG: tl.constexpr, FAST: tl.constexpr):
    """Add the number of elements of a part that E4M3 could not hold."""
    NB: tl.constexpr = halves[0].shape[1]
    m, amax_row, vs, scales = _scaled(halves, m0, geo, ptr, scales_t, signs, CFG, FAST)
    _, stored, _, encode = scales
    stored = to_tile(stored, 1, CFG)
    words = noise_words(m, geo[1] // 16 + tl.arange(0, NB)[None, :], noise, stored, CFG)
    lost = inexact(vs, words, to_tile(encode, 1, CFG), stored, amax_row, CFG, FAST)
    tl.atomic_add(ptr[3], tl.sum(tl.sum(lost, axis=1), axis=0))


@triton.jit
def row_copy(
    x_ptr, stride, geo, ptr, noise, signs,
    TOKENS: tl.constexpr, BN: tl.constexpr, LOOP: tl.constexpr,
    CFG: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Quantize a tile of TOKENS by BN row by row. LOOP: part after part, from the cache."""
    NB: tl.constexpr = BN // 16
    ROWS: tl.constexpr = max(PART // BN, CFG[BLOCK] if CFG[TWO_D] else 1)
    BM: tl.constexpr = min(ROWS, TOKENS)
    m0 = geo[0]
    scales_t = tensor_scales(ptr[2], CFG)
    far = tl.zeros([BM, NB], tl.int32)
    if LOOP:
        for s in range(0, TOKENS, BM):
            halves = load_blocks(x_ptr, stride, m0 + s, geo, BM, NB, EVEN)
            new = _part(halves, m0 + s, geo, ptr, scales_t, noise, signs, CFG, EVEN, FAST)
            far = tl.maximum(far, new)
    else:
        parts = ()
        for s in tl.static_range(0, TOKENS, BM):
            parts = parts + (load_blocks(x_ptr, stride, m0 + s, geo, BM, NB, EVEN),)
        for s in tl.static_range(0, TOKENS, BM):
            new = _part(parts[s // BM], m0 + s, geo, ptr, scales_t, noise, signs, CFG, EVEN, FAST)
            far = tl.maximum(far, new)
    if CFG[OUT] == "e4m3":
        worst = tl.max(tl.max(far, axis=1), axis=0)
        if worst > 0:
            for t in range(0, TOKENS, BM):  # not s: a static loop above made that a constant
                halves = load_blocks(x_ptr, stride, m0 + t, geo, BM, NB, EVEN)
                _count(halves, m0 + t, geo, ptr, scales_t, noise, signs, CFG, FAST)
