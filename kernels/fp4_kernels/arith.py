"""Device arithmetic shared by every kernel here: noise, rounding to small grids, block scales.

Each function repeats, operation by operation, what a plain-PyTorch reference would do in fp32, so that
codes and scales agree bit for bit. Two rules keep it so:

- kernels are compiled with ``enable_fp_fusion=False``: a product is rounded before it is added to
  something, unless ``tl.fma`` says otherwise (it does so only where the product is exact);
- divisions are IEEE (``tl.div_rn``); Triton's ``/`` on fp32 is an approximation.
"""

import triton
import triton.language as tl

FLT_MAX = tl.constexpr(3.4028234663852886e38)
EXPONENT_FIELD = tl.constexpr(0x7F800000)


@triton.jit
def bits_of(x):
    """The fp32 bits as int32."""
    return x.to(tl.int32, bitcast=True)


@triton.jit
def float_of(bits):
    """int32 bits as fp32."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def max_nan(a, b):
    """The larger one, or NaN if either is."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def max_axis(a, AXIS: tl.constexpr, FAST: tl.constexpr):
    """Maxima of non-negative fp32 along an axis, NaN where one is in it.

    Integer order puts NaN over Inf over any number; FAST takes the hardware's max that passes NaN on.
    """
    if FAST:
        return tl.reduce(a, AXIS, max_nan)
    else:
        return float_of(tl.max(bits_of(a), axis=AXIS))


@triton.jit
def widen(x, FAST: tl.constexpr):
    """16-bit floats (or fp32) as fp32. FAST: bfloat16 pairs by one operation an element."""
    if FAST and x.dtype == tl.bfloat16:
        return tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "=r,=r,r",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        return x.to(tl.float32)


@triton.jit
def round_bf16(x, FAST: tl.constexpr):
    """fp32 rounded to the nearest bfloat16 (ties to even), as fp32.

    FAST: PTX that converts two at a time (a plain cast goes one by one, at a quarter of the rate).
    """
    if FAST:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; cvt.rn.bf16x2.f32 t, $3, $2; shl.b32 $0, t, 16; and.b32 $1, t, 0xffff0000; }",
            "=r,=r,r,r",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        bits = bits_of(x)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        return float_of(tl.where(x == x, rounded, bits))


@triton.jit
def near_reciprocal(x, FAST: tl.constexpr):
    """1 / x of fp32 x, to an ulp; 0 for numbers above 2^126. FAST: one instruction, on NVIDIA's GPUs."""
    if FAST:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def near_exp2(x, FAST: tl.constexpr):
    """2^x of fp32 x, to two ulps; 0 for x below -126. FAST: one instruction, on NVIDIA's GPUs."""
    if FAST:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def philox7(c0, c1, STREAM: tl.constexpr, key):
    """Philox4x32 with seven rounds on the counter (c0, c1, STREAM, 0): four uint32 words.

    c0 and c1 may be a row and a column: they are broadcast by the rounds that need both.
    """
    k0 = key.to(tl.uint32)
    k1 = (key >> 32).to(tl.uint32)
    c0 = c0.to(tl.uint32)
    c1 = c1.to(tl.uint32)
    c2 = tl.zeros_like(c0) + STREAM
    c3 = tl.zeros_like(c0)
    for _ in tl.static_range(7):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def nvfp4_tensor_scales(amax, TENSOR_MAX: tl.constexpr):
    """(S_enc, S_dec) of a tensor's amax: TENSOR_MAX / amax, and its reciprocal; NaN where not finite."""
    enc = tl.minimum(tl.div_rn(tl.zeros_like(amax) + TENSOR_MAX, amax), FLT_MAX)
    enc = tl.where((amax == 0.0) | (enc == 0.0), 1.0, enc)
    enc = tl.where(amax < float("inf"), enc, float("nan"))
    return enc, tl.div_rn(tl.zeros_like(enc) + 1.0, enc)


@triton.jit
def nvfp4_encode(scale, s_dec, FAST: tl.constexpr):
    """What an element is multiplied with under the decoded block scale: min(1 / (s_b * S_dec), FLT_MAX).

    FAST: the division's own fast path (approximation and one Newton step, correctly rounded) without its
    branch for numbers near the ends of the range: a power of two for the whole tensor moves them away.
    """
    t = scale * s_dec
    if FAST:
        far = tl.where(s_dec < 2.0**-60, 2.0**64, tl.where(s_dec > 2.0**60, 2.0**-32, 1.0))
        t = t * far
        r = near_reciprocal(t, FAST)
        r = tl.minimum(r, FLT_MAX)  # a zero block: the step below then gives infinity, not NaN
        r = tl.fma(r, tl.fma(-t, r, 1.0), r)
        return tl.minimum(r * far, FLT_MAX)
    else:
        return tl.minimum(tl.div_rn(tl.zeros_like(t) + 1.0, t), FLT_MAX)


@triton.jit
def round_fp8(y, E5M2: tl.constexpr, FAST: tl.constexpr):
    """fp32 to (FP8 code as int32, its fp32 value): nearest even, saturating; NaN stays NaN.

    FAST uses the hardware's conversion; elsewhere the grid is reached by arithmetic, as for E2M1.
    """
    LIMIT: tl.constexpr = 57344.0 if E5M2 else 448.0
    if FAST:
        y = tl.clamp(y, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        q = y.to(tl.float8e5) if E5M2 else y.to(tl.float8e4nv)
        return q.to(tl.uint8, bitcast=True).to(tl.int32), q.to(tl.float32)
    else:
        MANTISSA: tl.constexpr = 2 if E5M2 else 3
        LEAST: tl.constexpr = 2.0**-14 if E5M2 else 2.0**-6
        ALIGN: tl.constexpr = 2.0**-112 if E5M2 else 2.0**-120
        a = tl.minimum(tl.abs(y), LIMIT)
        p = tl.maximum(float_of(bits_of(a) & EXPONENT_FIELD), LEAST)
        magic: tl.constexpr = 1.5 * 2.0 ** (23 - MANTISSA)
        r = tl.fma(p, -magic, tl.fma(p, magic, a))
        code = bits_of(r * ALIGN) >> (23 - MANTISSA)
        code = tl.where(y == y, code, 0x7F) | ((bits_of(y) >> 24) & 0x80)
        r = float_of(bits_of(r) | (bits_of(y) & -0x80000000))
        return code, tl.where(y == y, r, float("nan"))


@triton.jit
def fp8_word(a, b, c, d, E5M2: tl.constexpr, FAST: tl.constexpr):
    """Four fp32 as FP8 codes in one int32, ``a`` lowest: nearest even, saturating; NaN stays NaN.

    FAST converts two at a time into halves of the word; bytes joined by shifts were miscompiled for sm_90.
    """
    if FAST:
        KIND: tl.constexpr = "e5m2x2" if E5M2 else "e4m3x2"
        ASM: tl.constexpr = (
            "{ .reg .b16 lo, hi; cvt.rn.satfinite." + KIND + ".f32 lo, $2, $1; "
            "cvt.rn.satfinite." + KIND + ".f32 hi, $4, $3; mov.b32 $0, {lo, hi}; }"
        )
        return tl.inline_asm_elementwise(
            ASM, "=r,r,r,r,r", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        word, _ = round_fp8(a, E5M2, FAST)
        byte, _ = round_fp8(b, E5M2, FAST)
        word = word | (byte << 8)
        byte, _ = round_fp8(c, E5M2, FAST)
        word = word | (byte << 16)
        byte, _ = round_fp8(d, E5M2, FAST)
        return word | (byte << 24)


@triton.jit
def poison(stored, scale, amax_b, s_enc, NAN_BYTE: tl.constexpr):
    """(byte, decoded scale) of blocks, NaN where the block's or the tensor's amax is not finite."""
    decode = tl.fma(amax_b, s_enc - s_enc, scale)  # s_enc - s_enc is 0, or NaN
    return tl.where(decode == decode, stored, NAN_BYTE).to(tl.uint8), decode


@triton.jit
def nvfp4_scales(amax_b, s_enc, s_dec, INVERSE_MAX: tl.constexpr, FAST: tl.constexpr):
    """(byte, decode, encode) of blocks from their amaxes."""
    stored, scale = round_fp8(tl.minimum(amax_b * (s_enc * INVERSE_MAX), 448.0), False, FAST)
    byte, decode = poison(stored, scale, amax_b, s_enc, 0x7F)
    return byte, decode, nvfp4_encode(scale, s_dec, FAST)


@triton.jit
def mx_byte(
    amax_b,
    RULE: tl.constexpr,
    EMAX: tl.constexpr,
    HALF_ULP: tl.constexpr,
    INVERSE_MAX: tl.constexpr,
):
    """int32 E8M0 bytes of block amaxes; 0 for a zero block, 255 for one that is not finite."""
    bits = bits_of(amax_b)
    if RULE == "rceil":
        bits = bits_of(amax_b * INVERSE_MAX)
        field = bits >> 23
        mantissa = bits & 0x7FFFFF
        byte = field + tl.where(field == 0, mantissa > 0x400000, mantissa > 0).to(tl.int32)
    elif RULE == "ceil":
        byte = ((bits + 0x7FFFFF) >> 23) - EMAX
    elif RULE == "even":
        byte = ((bits + HALF_ULP) >> 23) - EMAX
    else:
        byte = (bits >> 23) - EMAX
    byte = tl.minimum(tl.maximum(byte, 0), 254)
    return tl.where(amax_b < float("inf"), byte, 255)


@triton.jit
def power_of_byte(byte):
    """fp32 2^(byte - 127) for bytes 0 to 254 (byte 0 is a subnormal of fp32); NaN for 255."""
    bits = tl.where(byte == 0, 0x400000, byte << 23)
    return float_of(tl.where(byte == 255, 0x7FC00000, bits))


@triton.jit
def mx_scales(
    amax_b,
    RULE: tl.constexpr,
    EMAX: tl.constexpr,
    HALF_ULP: tl.constexpr,
    INVERSE_MAX: tl.constexpr,
):
    """(byte, decode, encode) of blocks from their amaxes."""
    byte = mx_byte(amax_b, RULE, EMAX, HALF_ULP, INVERSE_MAX)
    encode = power_of_byte(tl.maximum(254 - byte, 0))
    if RULE == "unbiased":
        encode = encode * 0.75
    return byte.to(tl.uint8), power_of_byte(byte), encode


@triton.jit
def fp8_scales(amax_b, MAX: tl.constexpr, POW2: tl.constexpr):
    """(decode, encode) of blocks, rows or a tensor: encode = MAX / amax, decode = 1 / encode."""
    encode = tl.minimum(tl.div_rn(tl.zeros_like(amax_b) + MAX, amax_b), FLT_MAX)
    encode = tl.where((amax_b == 0.0) | (encode == 0.0), 1.0, encode)
    if POW2:
        encode = float_of(bits_of(encode) & EXPONENT_FIELD)
    encode = tl.where(amax_b < float("inf"), encode, float("nan"))
    return tl.div_rn(tl.zeros_like(encode) + 1.0, encode), encode
