"""A column copy of a tile: a copy of the transpose, its blocks along the tokens.

A block of sixteen tokens is one register of each of the sixteen tensors, so amax, rotation, rounding and
packing move nothing between threads; only finished words (eight 4-bit codes, four bytes or two bfloat16)
are exchanged, to be stored along the tokens.
"""

import triton
import triton.language as tl

from fp4_kernels import arith
from fp4_kernels.copies import (
    AMAX,
    BLOCK,
    ELEMENT,
    KIND,
    OUT,
    PARTS,
    ROTATION,
    ROUNDING,
    RULE,
    SIGNS,
    TIES,
    TWO_D,
    apart,
    block_scales,
    choose_scale,
    e4m3_inexact,
    e4m3_power,
    elements,
    exact_values,
    four_over_six_candidates,
    max_columns,
    max_rows,
    row_factor,
    spread_columns,
    spread_rows,
    squared_error,
    store,
    tensor_scales,
    tree,
    tree_columns,
)
from fp4_kernels.rotation import finish, hadamard_tokens


@triton.jit
def _values(xs, signs, CFG: tl.constexpr, FAST: tl.constexpr):
    """The tile in fp32, rotated along the tokens where the copy is."""
    vs = ()
    for i in tl.static_range(16):
        vs = vs + (xs[i].to(tl.float32),)
    if CFG[ROTATION] > 0:
        hs = hadamard_tokens(
            vs, signs[0], signs[1], tl.constexpr(CFG[ROTATION]), tl.constexpr(CFG[SIGNS])
        )
        vs = ()
        for i in tl.static_range(16):
            vs = vs + (finish(hs[i], tl.constexpr(CFG[ROTATION]), FAST),)
    return vs


@triton.jit
def _noise_words(m0, n, stored, noise, CFG: tl.constexpr):
    """The Philox words of sixteen tokens [TB, BN]: four, or sixteen for stochastic_full.

    ``stored``: scale bytes [TB, BN], whose upper bits (zeros) tie the words to the tile's threads, as in
    ``row_noise``.
    """
    TB: tl.constexpr = stored.shape[0]
    key, row_offset, row_part, row_gap, call_offset, call_part, call_gap = noise
    row = row_offset + apart(n, row_part, row_gap, tl.constexpr(CFG[PARTS]))
    call = m0 // 16 + tl.arange(0, TB)[:, None]
    call = call_offset + apart(call, call_part, call_gap, tl.constexpr(CFG[PARTS]))
    row = row + (stored.to(tl.int32) >> 8)
    if CFG[ROUNDING] == "stochastic":
        return arith.philox7(call, row, 0, key)
    else:
        words = ()
        for quarter in tl.static_range(4):
            words = words + arith.philox7(call * 4 + quarter, row, 1, key)
        return words


@triton.jit
def _errors(vs, scale, encode, s_enc, CFG: tl.constexpr):
    """Squared errors of blocks under one candidate scale, in the scale's shape."""
    es = ()
    for i in tl.static_range(16):
        if CFG[TWO_D]:
            s = spread_columns(scale, 16)
            c = spread_columns(encode, 16)
        else:
            s = scale
            c = encode
        es = es + (squared_error(vs[i], s, c, s_enc, tl.constexpr(CFG[TIES])),)
    total = tree(es)
    if CFG[TWO_D]:
        total = tree_columns(total)
    return total


@triton.jit
def _scales(vs, scales_t, amax_row, CFG: tl.constexpr, FAST: tl.constexpr):
    """(stored, decode, encode) of the tile's blocks: [TB / P, BN], 2d [TB / P, BN / L], or [1, BN]."""
    if CFG[BLOCK] == 0:
        return block_scales(amax_row, scales_t[0], scales_t[1], CFG, FAST)
    else:
        a = tl.abs(vs[0])
        for i in tl.static_range(1, 16):
            a = arith.max_nan(a, tl.abs(vs[i]))
        a = max_rows(a, tl.constexpr(CFG[BLOCK] // 16), FAST)
        if CFG[TWO_D]:
            a = max_columns(a, tl.constexpr(CFG[BLOCK]), FAST)
        if CFG[RULE] == "four_over_six":
            six, encode_6, four, encode_4 = four_over_six_candidates(
                a, scales_t[0], scales_t[1], FAST
            )
            e6 = _errors(vs, six, encode_6, scales_t[0], CFG)
            e4 = _errors(vs, four, encode_4, scales_t[0], CFG)
            return choose_scale(a, six, four, e6, e4, scales_t[0], scales_t[1], FAST)
        else:
            return block_scales(a, scales_t[0], scales_t[1], CFG, FAST)


@triton.jit
def _to_tile(s, CFG: tl.constexpr):
    """Block values to the tile's [TB, BN] ([1, BN] and scalars broadcast as they are)."""
    if CFG[BLOCK] == 0:
        return s
    else:
        s = spread_rows(s, tl.constexpr(CFG[BLOCK] // 16))
        if CFG[TWO_D]:
            s = spread_columns(s, tl.constexpr(CFG[BLOCK]))
        return s


@triton.jit
def _store_scales(stored, amax_row, n, geo, ptr, CFG: tl.constexpr, EVEN: tl.constexpr):
    m0, n0, R, C = geo
    L: tl.constexpr = CFG[BLOCK]
    if CFG[OUT] == "e4m3":
        tl.store(ptr[1] + n, row_factor(amax_row, CFG), mask=n < tl.where(m0 == 0, C, 0))
    elif CFG[AMAX] == "row":
        tl.store(ptr[1] + n, stored, mask=n < tl.where(m0 == 0, C, 0))
    elif CFG[OUT] == "codes" and L > 0:
        token = m0 // L + tl.arange(0, stored.shape[0])[None, :]
        if CFG[TWO_D]:
            feature = n0 // L + tl.arange(0, stored.shape[1])[:, None]
            inside = (feature * L < C) & (token * L < R)
        else:
            feature = n0 + tl.arange(0, stored.shape[1])[:, None]
            inside = (feature < C) & (token * L < R)
        store(ptr[1] + feature.to(tl.int64) * (R // L) + token, tl.trans(stored), inside, EVEN)


@triton.jit
def _word_of_codes(qs, W: tl.constexpr, good):
    """int32 word W of eight 4-bit codes, zero where the block has no scale."""
    word = arith.e2m1_code(qs[8 * W])
    for j in tl.static_range(1, 8):
        word = word | (arith.e2m1_code(qs[8 * W + j]) << (4 * j))
    return tl.where(good, word, 0)


@triton.jit
def _word_of_bf16(low, high):
    """int32 word of two fp32 values that are bfloat16 numbers: their upper halves."""
    low = (arith.bits_of(low).to(tl.uint32, bitcast=True) >> 16).to(tl.int32, bitcast=True)
    return low | (arith.bits_of(high) & -0x10000)


@triton.jit
def _store_words(ws, geo, out_ptr, EVEN: tl.constexpr):
    """Words [TB, BN], the tuple's index running fastest along the tokens, to [columns, tokens]."""
    TB: tl.constexpr = ws[0].shape[0]
    BN: tl.constexpr = ws[0].shape[1]
    W: tl.constexpr = len(ws)
    m0, n0, R, C = geo
    if W == 2:
        w = tl.join(ws[0], ws[1])
    elif W == 4:
        w = tl.join(tl.join(ws[0], ws[2]), tl.join(ws[1], ws[3]))
    else:
        even = tl.join(tl.join(ws[0], ws[4]), tl.join(ws[2], ws[6]))
        odd = tl.join(tl.join(ws[1], ws[5]), tl.join(ws[3], ws[7]))
        w = tl.join(even, odd)
    w = tl.reshape(tl.permute(tl.reshape(w, [TB, BN, W]), (1, 0, 2)), [BN, TB * W])
    n = n0 + tl.arange(0, BN)[:, None]
    t = m0 // 16 * W + tl.arange(0, TB * W)[None, :]
    inside = (n < C) & (t < R // 16 * W)
    store(out_ptr + n.to(tl.int64) * (R // 16 * W) + t, w, inside, EVEN)


@triton.jit
def _words(qs, values, byte, decode, amax_row, CFG: tl.constexpr, FAST: tl.constexpr):
    """(words of the tile's outputs, int32 counts of inexact elements)."""
    lost = 0
    ws = ()
    if CFG[OUT] == "exact":
        for k in tl.static_range(8):
            low = exact_values(values[2 * k], decode, CFG)
            ws = ws + (_word_of_bf16(low, exact_values(values[2 * k + 1], decode, CFG)),)
    elif CFG[OUT] == "e4m3":
        if CFG[TWO_D]:  # a row's factor is one number a column of this tile, a scale one a block
            byte = spread_columns(byte, tl.constexpr(CFG[BLOCK]))
        power = spread_rows(e4m3_power(byte, amax_row, CFG), tl.constexpr(CFG[BLOCK] // 16))
        vs = ()
        for i in tl.static_range(16):
            vs = vs + (values[i] * power,)
            lost = lost + e4m3_inexact(vs[i])
        for k in tl.static_range(4):
            word = arith.fp8_word(
                vs[4 * k], vs[4 * k + 1], vs[4 * k + 2], vs[4 * k + 3], False, FAST
            )
            ws = ws + (word,)
    elif CFG[ELEMENT] == "e2m1":
        for k in tl.static_range(2):
            ws = ws + (_word_of_codes(qs, k, decode == decode),)
    else:  # the values are not rounded yet
        for k in tl.static_range(4):
            word = arith.fp8_word(
                values[4 * k], values[4 * k + 1], values[4 * k + 2], values[4 * k + 3],
                tl.constexpr(CFG[ELEMENT] == "e5m2"), FAST,
            )  # fmt: skip
            if CFG[KIND] == "mx":
                word = tl.where(decode == decode, word, 0)
            ws = ws + (word,)
    return ws, lost


@triton.jit
def column_copy(
    xs, geo, ptr, noise, signs, CFG: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr
):
    """Quantize the tile's transpose. Returns int32 counts of inexact elements (OUT e4m3)."""
    BN: tl.constexpr = xs[0].shape[1]
    m0, n0, R, C = geo
    n = n0 + tl.arange(0, BN)[None, :]
    scales_t = tensor_scales(ptr[2], CFG)
    amax_row = scales_t[0]
    if CFG[AMAX] == "row":
        amax_row = tl.load(ptr[2] + n, mask=n < C, other=0.0)
    vs = _values(xs, signs, CFG, FAST)
    stored, decode, encode = _scales(vs, scales_t, amax_row, CFG, FAST)
    _store_scales(stored, amax_row, n, geo, ptr, CFG, EVEN)
    decode, encode = _to_tile(decode, CFG), _to_tile(encode, CFG)
    if CFG[ROUNDING] != "nearest":
        words = _noise_words(m0, n, _to_tile(stored, CFG), noise, CFG)
    qs = ()
    values = ()
    for i in tl.static_range(16):
        if CFG[ROUNDING] == "stochastic":
            bits = arith.byte_to_remainder(words[i // 4], 8 * (i % 4))
        elif CFG[ROUNDING] == "stochastic_full":
            bits = (words[i] >> 8).to(tl.int32)
        else:
            bits = 0
        if CFG[ELEMENT] != "e2m1" and CFG[OUT] == "codes":
            q, value = 0, vs[i] * encode  # rounded as words are made
        else:
            q, value = elements(vs[i], encode, bits, CFG, FAST)
        qs = qs + (q,)
        values = values + (value,)
    ws, lost = _words(qs, values, stored, decode, amax_row, CFG, FAST)
    _store_words(ws, geo, ptr[0], EVEN)
    return lost
