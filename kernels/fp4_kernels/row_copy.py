"""A row copy of a tile: blocks along the columns, one token after the other."""

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
from fp4_kernels.rotation import finish, hadamard_columns


@triton.jit
def _values(x, signs, CFG: tl.constexpr, FAST: tl.constexpr):
    """One token's tile in fp32, rotated where the copy is."""
    v = x.to(tl.float32)
    if CFG[ROTATION] > 0:
        v = finish(
            hadamard_columns(
                v, signs[0], signs[1], tl.constexpr(CFG[ROTATION]), tl.constexpr(CFG[SIGNS])
            ),
            tl.constexpr(CFG[ROTATION]),
            FAST,
        )
    return v


@triton.jit
def row_noise(m, n0, BN: tl.constexpr, noise, stored, CFG: tl.constexpr):
    """int32 [TB, BN] noise of rows m [TB, 1], columns n0 on; 0 for nearest rounding.

    ``stored``: the blocks' scale bytes [TB, BN / L]. Their upper bits, zeros, are added to the counter:
    that costs nothing and makes the compiler draw the words in the threads that need them.
    """
    TB: tl.constexpr = m.shape[0]
    if CFG[ROUNDING] == "nearest":
        return 0
    else:
        key, row_offset, row_part, row_gap, call_offset, call_part, call_gap = noise
        row = row_offset + apart(m, row_part, row_gap, tl.constexpr(CFG[PARTS]))
        call = n0 // 16 + tl.arange(0, BN // 16)[None, :]
        call = call_offset + apart(call, call_part, call_gap, tl.constexpr(CFG[PARTS]))
        if CFG[ROUNDING] == "stochastic":
            call = call + spread_columns(stored.to(tl.int32) >> 8, tl.constexpr(CFG[BLOCK] // 16))
            word = _select_word(
                arith.philox7(call, row, 0, key), tl.arange(0, 16)[None, None, :] // 4
            )
            shift = (tl.arange(0, 16)[None, None, :] & 3) * 8
            return tl.reshape(arith.byte_to_remainder(word, shift), [TB, BN])
        else:
            quarter = tl.arange(0, 4)[None, None, :]
            calls = tl.reshape(call[:, :, None] * 4 + quarter, [1, BN // 4])
            word = _select_word(arith.philox7(calls, row, 1, key), quarter)
            return tl.reshape((word >> 8).to(tl.int32), [TB, BN])


@triton.jit
def _select_word(words, index):
    """Word ``index`` (0 to 3, [1, 1, J]) of four [TB, B]: [TB, B, J]."""
    low = tl.where((index & 1) == 0, words[0][:, :, None], words[1][:, :, None])
    high = tl.where((index & 1) == 0, words[2][:, :, None], words[3][:, :, None])
    return tl.where((index & 2) == 0, low, high)


@triton.jit
def _errors(v, candidates, s_enc, CFG: tl.constexpr):
    """Squared errors [TB, BN / 16] of a token's blocks under both candidates [TB, BN / 16]."""
    TB: tl.constexpr = v.shape[0]
    BN: tl.constexpr = v.shape[1]
    b = tl.reshape(v, [TB, BN // 16, 16])
    six, encode_6, four, encode_4 = candidates
    e6 = squared_error(b, six[:, :, None], encode_6[:, :, None], s_enc, tl.constexpr(CFG[TIES]))
    e4 = squared_error(b, four[:, :, None], encode_4[:, :, None], s_enc, tl.constexpr(CFG[TIES]))
    return (
        tree_columns(tl.reshape(e6, [TB, BN])),
        tree_columns(tl.reshape(e4, [TB, BN])),
    )


@triton.jit
def _tile_scales(xs, signs, scales_t, CFG: tl.constexpr, FAST: tl.constexpr):
    """2d: (stored, decode, encode) [TB / P, BN / L] of tiles of L tokens by L columns."""
    L: tl.constexpr = CFG[BLOCK]
    P: tl.constexpr = L // 16
    a = max_columns(tl.abs(_values(xs[0], signs, CFG, FAST)), L, FAST)
    for i in tl.static_range(1, 16):
        a = arith.max_nan(a, max_columns(tl.abs(_values(xs[i], signs, CFG, FAST)), L, FAST))
    a = max_rows(a, P, FAST)
    if CFG[RULE] == "four_over_six":
        candidates = four_over_six_candidates(a, scales_t[0], scales_t[1], FAST)
        e6 = ()
        e4 = ()
        for i in tl.static_range(16):
            pair = _errors(_values(xs[i], signs, CFG, FAST), candidates, scales_t[0], CFG)
            e6 = e6 + (pair[0],)
            e4 = e4 + (pair[1],)
        return choose_scale(
            a, candidates[0], candidates[2], tree(e6), tree(e4), scales_t[0], scales_t[1], FAST
        )
    else:  # not after a return: the compiler would look at both
        return block_scales(a, scales_t[0], scales_t[1], CFG, FAST)


@triton.jit
def _row_scales(v, amax_row, scales_t, CFG: tl.constexpr, FAST: tl.constexpr):
    """1d: (stored, decode, encode) [TB, BN / L] of one token's blocks ([TB, 1] where L = 0)."""
    if CFG[BLOCK] == 0:
        return block_scales(amax_row, scales_t[0], scales_t[1], CFG, FAST)
    else:
        a = max_columns(tl.abs(v), tl.constexpr(CFG[BLOCK]), FAST)
        if CFG[RULE] == "four_over_six":
            candidates = four_over_six_candidates(a, scales_t[0], scales_t[1], FAST)
            e6, e4 = _errors(v, candidates, scales_t[0], CFG)
            return choose_scale(
                a, candidates[0], candidates[2], e6, e4, scales_t[0], scales_t[1], FAST
            )
        else:
            return block_scales(a, scales_t[0], scales_t[1], CFG, FAST)


@triton.jit
def _store_elements(
    q,
    value,
    byte,
    decode,
    m,
    geo,
    ptr,
    amax_row,
    CFG: tl.constexpr,
    EVEN: tl.constexpr,
    FAST: tl.constexpr,
):
    """Write one token's elements; returns int32 counts of those that E4M3 could not hold."""
    BN: tl.constexpr = q.shape[1]
    _, n0, R, C = geo
    n = n0 + tl.arange(0, BN)[None, :]
    inside = (m < R) & (n < C)
    offset = m.to(tl.int64) * C + n
    if CFG[OUT] == "exact":
        value = exact_values(value, decode, CFG).to(tl.bfloat16)
        store(ptr[0] + offset, value, inside, EVEN)
        return 0
    elif CFG[OUT] == "e4m3":
        value = value * spread_columns(e4m3_power(byte, amax_row, CFG), tl.constexpr(CFG[BLOCK]))
        code, _ = arith.round_fp8(value, False, FAST)
        store(ptr[0] + offset, code.to(tl.uint8), inside, EVEN)
        return tl.where(inside, e4m3_inexact(value), 0)
    else:
        if CFG[KIND] == "mx":
            q = tl.where(decode == decode, q, 0)
        store(ptr[0] + offset, q.to(tl.uint8), inside, EVEN)
        return 0


@triton.jit
def _store_tile_scales(stored, geo, ptr, CFG: tl.constexpr, EVEN: tl.constexpr):
    """2d scales [TB / P, BN / L] of a tile, one for L tokens by L columns."""
    if CFG[OUT] == "codes":
        m0, n0, R, C = geo
        L: tl.constexpr = CFG[BLOCK]
        a = m0 // L + tl.arange(0, stored.shape[0])[:, None]
        b = n0 // L + tl.arange(0, stored.shape[1])[None, :]
        store(ptr[1] + a * (C // L) + b, stored, (a * L < R) & (b * L < C), EVEN)


@triton.jit
def _store_row_factors(stored, amax_row, m, geo, ptr, CFG: tl.constexpr):
    """What a whole row shares, [TB, 1]: written by the programs of the first columns."""
    _, n0, R, _ = geo
    rows = tl.where(n0 == 0, R, 0)
    if CFG[OUT] == "e4m3":
        tl.store(ptr[1] + m, row_factor(amax_row, CFG), mask=m < rows)
    elif CFG[AMAX] == "row":
        tl.store(ptr[1] + m, stored, mask=m < rows)


@triton.jit
def _words(q, good):
    """One token's 4-bit codes [TB, BN] as int32 words [TB, BN / 8], 0 where a block has no scale."""
    TB: tl.constexpr = q.shape[0]
    BN: tl.constexpr = q.shape[1]
    j = tl.arange(0, 8)[None, None, :]
    word = tl.sum(tl.reshape(arith.e2m1_code(q), [TB, BN // 8, 8]) << (j * 4), axis=2)
    good = tl.max(tl.reshape(good.to(tl.int32), [TB, BN // 8, 8]), axis=2)
    return tl.where(good > 0, word, 0)


@triton.jit
def _store_stacked(ts, m0, n0, R, C, ptr, EVEN: tl.constexpr):
    """Sixteen [TB, B], one a token, to rows m0 on and columns n0 on of a [R, C] array: one exchange."""
    TB: tl.constexpr = ts[0].shape[0]
    B: tl.constexpr = ts[0].shape[1]
    for step in tl.static_range(4):
        joined = ()
        for i in tl.static_range(8 >> step):
            joined = joined + (tl.join(ts[i], ts[i + (8 >> step)]),)
        ts = joined
    t = tl.permute(tl.reshape(ts[0], [TB, B, 16]), (0, 2, 1))
    m = m0 + tl.arange(0, TB * 16)[:, None]
    n = n0 + tl.arange(0, B)[None, :]
    t = tl.reshape(t, [TB * 16, B])
    store(ptr + m.to(tl.int64) * C + n, t, (m < R) & (n < C), EVEN)


@triton.jit
def row_copy(xs, geo, ptr, noise, signs, CFG: tl.constexpr, EVEN: tl.constexpr, FAST: tl.constexpr):
    """Quantize the tile row by row. Returns int32 [TB, BN] counts of inexact elements (OUT e4m3)."""
    TB: tl.constexpr = xs[0].shape[0]
    BN: tl.constexpr = xs[0].shape[1]
    L: tl.constexpr = CFG[BLOCK]
    m0, n0, R, C = geo
    scales_t = tensor_scales(ptr[2], CFG)
    if CFG[TWO_D]:
        stored_t, decode_t, encode_t = _tile_scales(xs, signs, scales_t, CFG, FAST)
        P: tl.constexpr = L // 16
        _store_tile_scales(stored_t, geo, ptr, CFG, EVEN)
        stored_t, decode_t = spread_rows(stored_t, P), spread_rows(decode_t, P)
        encode_t = spread_rows(encode_t, P)
    lost = tl.zeros([TB, BN], tl.int32)
    all_stored = ()
    all_words = ()
    for i in tl.static_range(16):
        m = m0 + tl.arange(0, TB)[:, None] * 16 + i
        v = _values(xs[i], signs, CFG, FAST)
        amax_row = scales_t[0]
        if CFG[AMAX] == "row":
            amax_row = tl.load(ptr[2] + m, mask=m < R, other=0.0)
        if CFG[TWO_D]:
            stored, decode, encode = stored_t, decode_t, encode_t
        else:
            stored, decode, encode = _row_scales(v, amax_row, scales_t, CFG, FAST)
            all_stored = all_stored + (stored,)
        _store_row_factors(stored, amax_row, m, geo, ptr, CFG)
        decode = spread_columns(decode, L)
        bits = row_noise(m, n0, BN, noise, stored, CFG)
        q, value = elements(v, spread_columns(encode, L), bits, CFG, FAST)
        if CFG[OUT] == "codes" and CFG[ELEMENT] == "e2m1":
            all_words = all_words + (_words(q, decode == decode),)
        else:
            lost += _store_elements(
                q, value, stored, decode, m, geo, ptr, amax_row, CFG, EVEN, FAST
            )
    if CFG[OUT] == "codes":
        if CFG[ELEMENT] == "e2m1":
            _store_stacked(all_words, m0, n0 // 8, R, C // 8, ptr[0], EVEN)
        if L > 0 and not CFG[TWO_D]:
            _store_stacked(all_stored, m0, n0 // L, R, C // L, ptr[1], EVEN)
    return lost
