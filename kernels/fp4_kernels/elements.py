"""Elements of one quantized copy: rounded under their block's scale, packed into words, stored.

As in ``copies.py`` a block is sixteen tensors, one for each place in it, and CFG says what is made of them.
"""

import triton
import triton.language as tl

from fp4_kernels import arith, e2m1
from fp4_kernels.copies import (
    BLOCK,
    ELEMENT,
    EMAX,
    HALF_ULP,
    INVERSE_MAX,
    KIND,
    OUT,
    PARTS,
    ROUNDING,
    RULE,
    TIES,
)


@triton.jit
def noise_words(row, call, noise, tie, CFG: tl.constexpr):
    """Philox words of blocks of sixteen elements: four, or sixteen for stochastic_full.

    ``row`` and ``call``: the blocks' local row and number of sixteen in it, which broadcast to ``tie``,
    scale bytes. Their upper bits, zeros, are added to a counter: that costs nothing and makes the
    compiler draw the words in the threads that need them.
    """
    if CFG[ROUNDING] == "nearest":
        return (0, 0, 0, 0)
    else:
        key, row_offset, row_part, row_gap, call_offset, call_part, call_gap = noise
        row = row_offset + apart(row, row_part, row_gap, tl.constexpr(CFG[PARTS]))
        call = call_offset + apart(call, call_part, call_gap, tl.constexpr(CFG[PARTS]))
        row = row + (tie.to(tl.int32) >> 8)
        if CFG[ROUNDING] == "stochastic":
            return arith.philox7(call, row, 0, key)
        else:
            words = ()
            for quarter in tl.static_range(4):
                words = words + arith.philox7(call * 4 + quarter, row, 1, key)
            return words


@triton.jit
def e4m3_frame(byte, amax_row, CFG: tl.constexpr):
    """(encode, unit, gap) of MXFP4 blocks written as E4M3 under the power of two of their row.

    The row's largest block scale 2^e becomes 2^6: 6 * 2^6 = 384 is below 448, and 0.5 * 2^(6 - 14) is
    E4M3's smallest step, so blocks down to 2^14 under the largest are exact. ``encode`` takes an element
    there (one number a row), ``unit`` is what a block's 1.0 becomes, ``gap`` how far it is below 2^6.
    """
    top = row_byte(amax_row, CFG)
    encode = arith.float_of((260 - top) << 23)
    if CFG[RULE] == "unbiased":
        encode = encode * 0.75
    gap = top - byte.to(tl.int32)
    return encode, e4m3_unit(gap), gap


@triton.jit
def e4m3_unit(gap):
    """What 1.0 becomes in blocks whose scale is ``gap`` powers of two under their row's largest."""
    return arith.float_of(tl.maximum(133 - gap, 1) << 23)


@triton.jit
def e4m3_factor(top):
    """fp32 factor of a row of E4M3 elements whose largest block scale has the byte ``top``, at least 6."""
    return arith.power_of_byte(top) * 0.015625


@triton.jit
def off_grid(value):
    """Whether E4M3 cannot hold elements in their row's frame: they are no multiples of 2^-9.

    Adding and taking away 1.5 * 2^14 rounds to those; what is that large is exact.
    """
    return tl.abs(value - ((value + 24576.0) - 24576.0)) > 0.0


@triton.jit
def row_byte(amax_row, CFG: tl.constexpr):
    """The E8M0 byte of a row's largest block scale, at least 6 so that 2^133 / 2^byte is finite."""
    byte = arith.mx_byte(
        amax_row,
        tl.constexpr(CFG[RULE]),
        tl.constexpr(CFG[EMAX]),
        tl.constexpr(CFG[HALF_ULP]),
        tl.constexpr(CFG[INVERSE_MAX]),
    )
    return tl.maximum(byte, 6)


@triton.jit
def row_factor(amax_row, CFG: tl.constexpr):
    """fp32 factor of a row of E4M3 elements."""
    return e4m3_factor(row_byte(amax_row, CFG))


@triton.jit
def far_blocks(amax_b, stored, amax_row, CFG: tl.constexpr):
    """int32: how many powers of two blocks are below what their row's E4M3 holds exactly (<= 0: none)."""
    _, _, gap = e4m3_frame(stored, amax_row, CFG)
    return tl.where(amax_b == 0.0, 0, gap - 14)  # a block of zeros loses nothing


@triton.jit
def inexact(vs, words, encode, byte, amax_row, CFG: tl.constexpr, FAST: tl.constexpr):
    """int32 counts of elements that E4M3 cannot hold: off the grid of 2^-9 in their row's frame."""
    _, unit, _ = e4m3_frame(byte, amax_row, CFG)
    lost = tl.zeros(vs[0].shape, tl.int32)
    six = tl.zeros_like(vs[0]) + 6.0
    for i in tl.static_range(16):
        value = value_of(vs[i] * encode, words, i, six, 1.0, CFG, FAST) * unit
        lost += off_grid(value).to(tl.int32)
    return lost


@triton.jit
def value_of(y, words, J: tl.constexpr, limit, unit, CFG: tl.constexpr, FAST: tl.constexpr):
    """Element J of a block on the E2M1 grid, fp32; ``limit`` and ``unit`` are for nearest rounding."""
    if CFG[ROUNDING] == "stochastic":
        z = e2m1.stochastic_bits(y, words[J // 4], J % 4, FAST)
        return e2m1.stochastic_value(z, FAST)
    elif CFG[ROUNDING] == "stochastic_full":
        return e2m1.stochastic_full_e2m1(y, (words[J] >> 8).to(tl.int32), FAST)
    else:
        return e2m1.nearest_e2m1(
            y, limit, unit, tl.constexpr(CFG[TIES]), tl.constexpr(CFG[OUT] == "codes"), FAST
        )


@triton.jit
def output_words(vs, words, scales, amax_row, CFG: tl.constexpr, FAST: tl.constexpr):
    """Blocks as they are stored, in int32 words: two of codes, four of FP8, eight of bfloat16.

    ``scales``: (stored, decode, encode), which broadcast to the sixteen tensors.
    """
    byte, decode, encode = scales
    if CFG[OUT] == "exact":
        return _exact_words(vs, words, decode, encode, CFG, FAST)
    elif CFG[OUT] == "e4m3":
        return _e4m3_words(vs, words, encode, byte, amax_row, CFG, FAST)
    else:
        ws = ()
        six = tl.zeros_like(vs[0]) + 6.0
        ys = ()
        for i in tl.static_range(16):
            y = vs[i] * encode
            if CFG[ELEMENT] == "e2m1":
                # an exact -0.0 has code 0, a negative that rounds to zero code 8
                y = value_of(y + 0.0, words, i, six, 1.0, CFG, FAST)
            ys = ys + (y,)
        if CFG[ELEMENT] == "e2m1":
            for k in tl.static_range(2):
                word = e2m1.e2m1_word(ys[8 * k : 8 * k + 8], FAST)
                ws = ws + (tl.where(decode == decode, word, 0),)
        else:
            for k in tl.static_range(4):
                word = arith.fp8_word(
                    ys[4 * k], ys[4 * k + 1], ys[4 * k + 2], ys[4 * k + 3],
                    tl.constexpr(CFG[ELEMENT] == "e5m2"), FAST,
                )  # fmt: skip
                if CFG[KIND] == "mx":
                    word = tl.where(decode == decode, word, 0)
                ws = ws + (word,)
        return ws


@triton.jit
def _exact_words(vs, words, decode, encode, CFG: tl.constexpr, FAST: tl.constexpr):
    ws = ()
    E2M1: tl.constexpr = CFG[ELEMENT] == "e2m1"
    BITS: tl.constexpr = CFG[ROUNDING] == "stochastic"
    six = tl.zeros_like(vs[0]) + 6.0
    for k in tl.static_range(8):
        pair = ()
        for i in tl.static_range(2 * k, 2 * k + 2):
            y = vs[i] * encode
            if not E2M1:
                _, q = arith.round_fp8(y, tl.constexpr(CFG[ELEMENT] == "e5m2"), FAST)
            elif BITS:
                q = e2m1.stochastic_bits(y, words[i // 4], i % 4, FAST)
            else:
                q = value_of(y, words, i, six, 1.0, CFG, FAST)
            pair = pair + (q,)
        if E2M1:
            ws = ws + (e2m1.exact_word(pair[0], pair[1], decode, BITS, FAST),)
        elif CFG[BLOCK] == 0:  # the element itself: its scale is left to alpha
            ws = ws + (e2m1.bf16_word(pair[0], pair[1]),)
        else:
            ws = ws + (e2m1.bf16_word(pair[0] * decode, pair[1] * decode),)
    return ws


@triton.jit
def _e4m3_words(vs, words, encode, byte, amax_row, CFG: tl.constexpr, FAST: tl.constexpr):
    row_encode, unit, _ = e4m3_frame(byte, amax_row, CFG)
    limit = unit * 6.0
    least = tl.maximum(unit, 2.0**-8)  # below it E4M3's own steps are coarser than the block's
    ws = ()
    for k in tl.static_range(4):
        qs = ()
        for i in tl.static_range(4 * k, 4 * k + 4):
            if CFG[ROUNDING] == "nearest":
                # rounded where E4M3 will hold it: powers of two change nothing else
                q = value_of(vs[i] * row_encode, words, i, limit, least, CFG, FAST)
            else:
                q = value_of(vs[i] * encode, words, i, limit, least, CFG, FAST) * unit
            qs = qs + (q,)
        ws = ws + (arith.fp8_word(qs[0], qs[1], qs[2], qs[3], False, FAST),)
    return ws


@triton.jit
def join_words(ws):
    """Two, four or eight [A, B] as [A, B, ...] whose last axes together are the tuple's index."""
    if len(ws) == 2:
        return tl.join(ws[0], ws[1])
    elif len(ws) == 4:
        return tl.join(tl.join(ws[0], ws[2]), tl.join(ws[1], ws[3]))
    else:
        even = tl.join(tl.join(ws[0], ws[4]), tl.join(ws[2], ws[6]))
        odd = tl.join(tl.join(ws[1], ws[5]), tl.join(ws[3], ws[7]))
        return tl.join(even, odd)


@triton.jit
def apart(index, part, gap, PARTS: tl.constexpr):
    """Global index: ``gap`` is left out after every ``part`` local ones."""
    if PARTS:
        index = index + index // part * gap
    return index


@triton.jit
def store(ptr, value, mask, EVEN: tl.constexpr):
    """A store that is masked only where the tile may reach over the matrix's edge.

    It is a streaming store: another kernel reads the copy, so the cache is left to the tile, which is
    read again.
    """
    if EVEN:
        tl.store(ptr, value, cache_modifier=".cs")
    else:
        tl.store(ptr, value, mask=mask, cache_modifier=".cs")
