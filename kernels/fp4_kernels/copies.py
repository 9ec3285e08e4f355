"""Scales of one quantized copy, whatever its format and direction (``elements.py`` has its elements).

Both copies are made from the same shape: sixteen tensors [A, B], one for each place in a block of sixteen
elements, so that a block lies in one thread: its amax, its rounding and its packing move nothing between
threads. What continues a block beyond sixteen elements is AXIS: 0 for a column copy (its tensors are
[tokens / 16, columns]), 1 for a row copy ([tokens, columns / 16]); tiles of 2d blocks take the other axis.

A copy is described to the compiler by ``CFG``, a tuple with the fields named below (made by
``spec.Copy.config``): every switch is resolved while compiling, so one family of kernels serves all
formats and none pays for another's.
"""

import triton
import triton.language as tl

from fp4_kernels import arith, e2m1

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
TENSOR_MAX = tl.constexpr(11)  # what amax is scaled to: nvfp4's product of maxima, fp8's maximum
INVERSE_MAX = tl.constexpr(12)  # 1 / the element's maximum
EMAX = tl.constexpr(13)  # exponent of the element's maximum
HALF_ULP = tl.constexpr(14)  # fp32 bits of half its last mantissa bit
AMAX = tl.constexpr(15)  # none | tensor | row: what the amax pointer holds
ROTATED_BF16 = tl.constexpr(16)  # whether a rotated copy is rounded to bfloat16 before its amax


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
def store_alpha(alpha_ptr, amax_ptr, partner_ptr, CFG: tl.constexpr):
    """What remains for the GEMM's result: amax / TENSOR_MAX (nvfp4), the scale (per-tensor fp8); behind it
    its product with the other operand's, where that is given."""
    if CFG[AMAX] == "tensor":
        amax = tl.load(amax_ptr)
        if CFG[KIND] == "nvfp4":
            alpha = tl.div_rn(amax, tl.zeros_like(amax) + CFG[TENSOR_MAX])
        else:
            alpha, _ = arith.fp8_scales(
                amax, tl.constexpr(CFG[TENSOR_MAX]), tl.constexpr(CFG[RULE] == "pow2")
            )
        tl.store(alpha_ptr, alpha)
        if partner_ptr is not None:
            tl.store(alpha_ptr + 1, alpha * tl.load(partner_ptr))


@triton.jit
def tree(es):
    """The sum of a tuple of tensors (a power of two of them), neighbours first."""
    for step in tl.static_range(4):
        sums = ()
        for i in tl.static_range(8 >> step):
            sums = sums + (es[2 * i] + es[2 * i + 1],)
        es = sums
    return es[0]


@triton.jit
def tree_axis(e, AXIS: tl.constexpr, G: tl.constexpr):
    """Sums of groups of G (1 or 16) along an axis, neighbours first."""
    if G == 16:
        for _step in tl.static_range(4):
            if AXIS == 0:
                e = tl.reshape(e, [e.shape[0] // 2, 2, e.shape[1]])
                e = tl.sum(e, axis=1)
            else:
                e = tl.reshape(e, [e.shape[0], e.shape[1] // 2, 2])
                e = tl.sum(e, axis=2)
    return e


@triton.jit
def group_max(a, AXIS: tl.constexpr, G: tl.constexpr, FAST: tl.constexpr):
    """Maxima of groups of G along an axis of [A, B], NaN where one is in it."""
    A: tl.constexpr = a.shape[0]
    B: tl.constexpr = a.shape[1]
    if G == 1:
        return a
    elif AXIS == 0:
        return arith.max_axis(tl.reshape(a, [A // G, G, B]), 1, FAST)
    else:
        return arith.max_axis(tl.reshape(a, [A, B // G, G]), 2, FAST)


@triton.jit
def spread(s, AXIS: tl.constexpr, G: tl.constexpr):
    """Each entry of [A, B] repeated G times along an axis."""
    A: tl.constexpr = s.shape[0]
    B: tl.constexpr = s.shape[1]
    if G == 1:
        return s
    elif AXIS == 0:
        return tl.reshape(tl.broadcast_to(s[:, None, :], [A, G, B]), [A * G, B])
    else:
        return tl.reshape(tl.broadcast_to(s[:, :, None], [A, B, G]), [A, B * G])


@triton.jit
def to_tile(s, AXIS: tl.constexpr, CFG: tl.constexpr):
    """Block values to the sixteen tensors' shape (BLOCK 0: what broadcasts stays as it is)."""
    if CFG[BLOCK] == 0:
        return s
    else:
        if CFG[TWO_D]:
            s = spread(s, 1 - AXIS, tl.constexpr(CFG[BLOCK]))
        return spread(s, AXIS, tl.constexpr(CFG[BLOCK] // 16))


@triton.jit
def block_amax(vs, AXIS: tl.constexpr, CFG: tl.constexpr, FAST: tl.constexpr):
    """Magnitudes of blocks: NaN where one is in it."""
    a = tl.abs(vs[0])
    for i in tl.static_range(1, 16):
        a = arith.max_nan(a, tl.abs(vs[i]))
    a = group_max(a, AXIS, tl.constexpr(CFG[BLOCK] // 16), FAST)
    if CFG[TWO_D]:
        a = group_max(a, 1 - AXIS, tl.constexpr(CFG[BLOCK]), FAST)
    return a


@triton.jit
def scales_of(amax_b, s_enc, s_dec, CFG: tl.constexpr, FAST: tl.constexpr):
    """(stored, decode, encode) of blocks from their amaxes."""
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
def _error(vs, scale, s_enc, s_dec, AXIS: tl.constexpr, CFG: tl.constexpr, FAST: tl.constexpr):
    """Sums of (q * s_b - x * S_enc)^2 over blocks rounded to nearest under one candidate scale."""
    G: tl.constexpr = 16 if CFG[TWO_D] else 1
    encode = spread(arith.nvfp4_encode(scale, s_dec, FAST), 1 - AXIS, G)
    s = spread(scale, 1 - AXIS, G)
    six = tl.zeros_like(encode) + 6.0
    es = ()
    for i in tl.static_range(16):
        q = e2m1.nearest_e2m1(vs[i] * encode, six, 1.0, tl.constexpr(CFG[TIES]), False, FAST)
        error = q * s - vs[i] * s_enc
        es = es + (error * error,)
    return tree_axis(tree(es), 1 - AXIS, G)


@triton.jit
def _four_over_six(
    vs, amax_b, s_enc, s_dec, AXIS: tl.constexpr, CFG: tl.constexpr, FAST: tl.constexpr
):
    """(stored, decode, encode): a block is scaled to 4 where that errs less than 6; a tie goes to 6."""
    scale = tl.div_rn(amax_b, tl.zeros_like(amax_b) + 6.0) * s_enc
    _, six = arith.round_fp8(tl.minimum(scale, 448.0), False, FAST)
    _, four = arith.round_fp8(tl.minimum(scale * 1.5, 448.0), False, FAST)
    error_6 = _error(vs, six, s_enc, s_dec, AXIS, CFG, FAST)
    error_4 = _error(vs, four, s_enc, s_dec, AXIS, CFG, FAST)
    stored, scale = arith.round_fp8(tl.where(error_4 < error_6, four, six), False, FAST)
    byte, decode = arith.poison(stored, scale, amax_b, s_enc, 0x7F)
    return byte, decode, arith.nvfp4_encode(scale, s_dec, FAST)


@triton.jit
def block_scales(vs, amax_row, scales_t, AXIS: tl.constexpr, CFG: tl.constexpr, FAST: tl.constexpr):
    """(amax, stored, decode, encode) of the blocks; where BLOCK is 0 those of the given ``amax_row``."""
    a = amax_row if CFG[BLOCK] == 0 else block_amax(vs, AXIS, CFG, FAST)
    if CFG[RULE] == "four_over_six":
        stored, decode, encode = _four_over_six(vs, a, scales_t[0], scales_t[1], AXIS, CFG, FAST)
    else:
        stored, decode, encode = scales_of(a, scales_t[0], scales_t[1], CFG, FAST)
    return a, stored, decode, encode
