"""Scales and elements of one quantized copy, whatever its format: the part rows and columns share.

A copy is described to the compiler by ``CFG``, a tuple with the fields named below (made by
``spec.Copy.config``): every switch is resolved while compiling, so one family of kernels serves all
formats and none pays for another's.
"""

import triton
import triton.language as tl

from fp4_kernels import arith

# Fields of CFG
KIND = tl.constexpr(0)  # nvfp4 | mx | fp8
ELEMENT = tl.constexpr(1)  # e2m1 | e4m3 | e5m2
BLOCK = tl.constexpr(2)  # block length along the contraction axis; 0: amax gives the scale
TWO_D = tl.constexpr(3)  # blocks are BLOCK x BLOCK tiles
RULE = tl.constexpr(4)  # the scale rule
ROUNDING = tl.constexpr(5)  # nearest | stochastic | stochastic_full
TIES = tl.constexpr(6)  # even | away
OUT = tl.constexpr(7)  # codes | exact | e4m3
ROTATION = tl.constexpr(8)  # Hadamard size, 0 for none
SIGNS = tl.constexpr(9)  # whether the rotation has signs
PARTS = tl.constexpr(10)  # whether the noise's coordinates have gaps
TENSOR_MAX = tl.constexpr(
    11
)  # what the tensor's amax is scaled to (nvfp4), the element's maximum (fp8)
INVERSE_MAX = tl.constexpr(12)  # 1 / the element's maximum
EMAX = tl.constexpr(13)  # exponent of the element's maximum
HALF_ULP = tl.constexpr(
    14
)  # fp32 bits of half its last mantissa bit: added before the exponent is cut
AMAX = tl.constexpr(15)  # none | tensor | row: what the amax pointer holds


@triton.jit
def tensor_scales(amax_ptr, CFG: tl.constexpr):
    """What holds for the whole operand: (S_enc, S_dec) of nvfp4, (amax, amax) of per-tensor fp8."""
    if CFG[KIND] == "nvfp4":
        return arith.nvfp4_tensor_scales(tl.load(amax_ptr), tl.constexpr(CFG[TENSOR_MAX]))
    elif CFG[AMAX] == "tensor":
        amax = tl.load(amax_ptr)
        return amax, amax
    else:
        return 0.0, 0.0


@triton.jit
def store_alpha(alpha_ptr, amax_ptr, CFG: tl.constexpr):
    """What remains for the GEMM's result: amax / TENSOR_MAX (nvfp4), the scale (per-tensor fp8)."""
    if CFG[AMAX] == "tensor":
        amax = tl.load(amax_ptr)
        if CFG[KIND] == "nvfp4":
            tl.store(alpha_ptr, tl.div_rn(amax, tl.zeros_like(amax) + CFG[TENSOR_MAX]))
        else:
            decode, _ = arith.fp8_scales(
                amax, tl.constexpr(CFG[TENSOR_MAX]), tl.constexpr(CFG[RULE] == "pow2")
            )
            tl.store(alpha_ptr, decode)


@triton.jit
def store(ptr, value, mask, EVEN: tl.constexpr):
    """A store that is masked only where the tile may hang over the edge."""
    if EVEN:
        tl.store(ptr, value)
    else:
        tl.store(ptr, value, mask=mask)


@triton.jit
def tree(es):
    """The sum of sixteen tensors, neighbours first."""
    for step in tl.static_range(4):
        sums = ()
        for i in tl.static_range(8 >> step):
            sums = sums + (es[2 * i] + es[2 * i + 1],)
        es = sums
    return es[0]


@triton.jit
def tree_columns(e):
    """Sums of groups of sixteen columns, neighbours first: [A, B] to [A, B / 16]."""
    A: tl.constexpr = e.shape[0]
    B: tl.constexpr = e.shape[1]
    for step in tl.static_range(4):
        e = tl.sum(tl.reshape(e, [A, B >> (step + 1), 2]), axis=2)
    return e


@triton.jit
def max_columns(a, L: tl.constexpr, FAST: tl.constexpr):
    """Maxima of groups of L columns, NaN where one is in it: [A, B] to [A, B / L]."""
    A: tl.constexpr = a.shape[0]
    B: tl.constexpr = a.shape[1]
    return arith.max_axis(tl.reshape(a, [A, B // L, L]), 2, FAST)


@triton.jit
def max_rows(a, P: tl.constexpr, FAST: tl.constexpr):
    """Maxima of groups of P rows, NaN where one is in it: [A, B] to [A / P, B]."""
    if P == 1:
        return a
    else:
        A: tl.constexpr = a.shape[0]
        B: tl.constexpr = a.shape[1]
        return arith.max_axis(tl.reshape(a, [A // P, P, B]), 1, FAST)


@triton.jit
def spread_columns(s, L: tl.constexpr):
    """[A, B] to [A, B * L], each column repeated (L = 0: s itself)."""
    if L < 2:
        return s
    else:
        A: tl.constexpr = s.shape[0]
        B: tl.constexpr = s.shape[1]
        return tl.reshape(tl.broadcast_to(s[:, :, None], [A, B, L]), [A, B * L])


@triton.jit
def spread_rows(s, P: tl.constexpr):
    """[A, B] to [A * P, B], each row repeated."""
    if P == 1:
        return s
    else:
        A: tl.constexpr = s.shape[0]
        B: tl.constexpr = s.shape[1]
        return tl.reshape(tl.broadcast_to(s[:, None, :], [A, P, B]), [A * P, B])


@triton.jit
def block_scales(amax_b, s_enc, s_dec, CFG: tl.constexpr, FAST: tl.constexpr):
    """(stored, decode, encode) of blocks from their amaxes; for four_over_six the scale to 6."""
    if CFG[KIND] == "nvfp4":
        return arith.nvfp4_scales(amax_b, s_enc, s_dec, tl.constexpr(CFG[INVERSE_MAX]), FAST)
    elif CFG[KIND] == "mx":
        return arith.mx_scales(
            amax_b,
            tl.constexpr(CFG[RULE]),
            tl.constexpr(CFG[EMAX]),
            tl.constexpr(CFG[HALF_ULP]),
            tl.constexpr(CFG[INVERSE_MAX]),
        )
    else:
        decode, encode = arith.fp8_scales(
            amax_b, tl.constexpr(CFG[TENSOR_MAX]), tl.constexpr(CFG[RULE] == "pow2")
        )
        return decode, decode, encode


@triton.jit
def four_over_six_candidates(amax_b, s_enc, s_dec, FAST: tl.constexpr):
    """(scale, encode) of a block scaled to 6 and (scale, encode) of it scaled to 4."""
    scale = tl.div_rn(amax_b, tl.zeros_like(amax_b) + 6.0) * s_enc
    _, six = arith.round_fp8(tl.minimum(scale, 448.0), False, FAST)
    _, four = arith.round_fp8(tl.minimum(scale * 1.5, 448.0), False, FAST)
    return six, arith.nvfp4_encode(six, s_dec, FAST), four, arith.nvfp4_encode(four, s_dec, FAST)


@triton.jit
def squared_error(x, scale, encode, s_enc, TIES: tl.constexpr):
    """(q * s_b - x * S_enc)^2 of elements rounded to nearest under one candidate scale."""
    _, q = arith.round_e2m1(x * encode, 0, "nearest", TIES, False)
    error = q * scale - x * s_enc
    return error * error


@triton.jit
def choose_scale(amax_b, six, four, error_6, error_4, s_enc, s_dec, FAST: tl.constexpr):
    """(stored, decode, encode): 4 where its error is smaller, a tie goes to 6."""
    chosen = tl.where(error_4 < error_6, four, six)
    encode = arith.nvfp4_encode(chosen, s_dec, FAST)
    stored, scale = arith.round_fp8(chosen, False, FAST)
    byte, decode = arith.poison(stored, scale, amax_b, s_enc, 0x7F)
    return byte, decode, encode


@triton.jit
def elements(v, encode, noise, CFG: tl.constexpr, FAST: tl.constexpr):
    """(q, value) of rounded elements: q the bits of ``round_e2m1`` or an FP8 code, both int32."""
    y = v * encode
    if CFG[ELEMENT] == "e2m1":
        if CFG[OUT] == "codes":
            y = y + 0.0  # an exact -0.0 has code 0, a negative that rounds to zero code 8
        return arith.round_e2m1(
            y, noise, tl.constexpr(CFG[ROUNDING]), tl.constexpr(CFG[TIES]), FAST
        )
    else:
        return arith.round_fp8(y, tl.constexpr(CFG[ELEMENT] == "e5m2"), FAST)


@triton.jit
def exact_values(value, decode, CFG: tl.constexpr):
    """Element times block scale in fp32 (BLOCK 0: the element itself, its scale is left to alpha)."""
    if CFG[BLOCK] > 0:
        return value * decode
    else:
        return value


@triton.jit
def e4m3_power(byte, amax_row, CFG: tl.constexpr):
    """What MXFP4 elements of a block with this scale byte are in E4M3 under the power of two of their row.

    The row's largest block scale 2^e becomes 2^6: 6 * 2^6 = 384 is below 448, and 0.5 * 2^(6 - 14) is
    E4M3's smallest step, so blocks down to 2^14 under the largest are exact.
    """
    row_byte = arith.mx_byte(
        amax_row,
        tl.constexpr(CFG[RULE]),
        tl.constexpr(CFG[EMAX]),
        tl.constexpr(CFG[HALF_ULP]),
        tl.constexpr(CFG[INVERSE_MAX]),
    )
    shift = tl.maximum(byte.to(tl.int32) - row_byte + 133, 1)
    return tl.where(byte == 255, float("nan"), arith.float_of(shift << 23))


@triton.jit
def e4m3_inexact(value):
    """int32 1 where E4M3 cannot hold an E2M1 element times a power of two: off the grid of 2^-9."""
    # adding and taking away 1.5 * 2^14 rounds to multiples of 2^-9; what is that large is exact
    return (tl.abs(value - ((value + 24576.0) - 24576.0)) > 0.0).to(tl.int32)


@triton.jit
def row_factor(amax_row, CFG: tl.constexpr):
    """fp32 factor of a row of ``e4m3_elements``."""
    row_byte = arith.mx_byte(
        amax_row,
        tl.constexpr(CFG[RULE]),
        tl.constexpr(CFG[EMAX]),
        tl.constexpr(CFG[HALF_ULP]),
        tl.constexpr(CFG[INVERSE_MAX]),
    )
    return arith.power_of_byte(row_byte) * 0.015625


@triton.jit
def apart(index, part, gap, PARTS: tl.constexpr):
    """Global index: ``gap`` is left out after every ``part`` local ones."""
    if PARTS:
        index = index + index // part * gap
    return index
