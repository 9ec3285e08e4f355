"""E2M1 elements: rounding to the grid and joining results into 32-bit words.

The grid is reached without branches or tables. Rounding to nearest adds and takes away a multiple of the
element's own power of two. Stochastic rounding scales by 2^-126: E2M1's subnormal step then lands on
fp32's own subnormals, so the fp32 bit pattern is sign, exponent and ONE mantissa bit followed by 22 bits
of remainder, to which 22 bits of noise are added before they are cut off.

FAST marks what needs NVIDIA's paired conversions (sm_89 and later); the other branch is the same in plain
arithmetic, for other GPUs and for Triton's interpreter.
"""

import triton
import triton.language as tl

from fp4_kernels.arith import EXPONENT_FIELD, bits_of, float_of

# 1.5 * 2^22: added to p <= |y| < 2p it leaves one mantissa bit, rounded to nearest even.
MAGIC = tl.constexpr(6291456.0)
TO_SUBNORMAL = tl.constexpr(2.0**-126)
FROM_SUBNORMAL = tl.constexpr(2.0**126)
# The largest float below a half: with it every tie is carried up, and nothing below a tie is.
ALMOST_HALF = tl.constexpr(0.49999997)


@triton.jit
def to_subnormal(y, FAST: tl.constexpr):
    """int32 bits of ``y`` * 2^-126 cut toward zero: remainders below 2^-23 never round a digit up."""
    if FAST:
        return tl.inline_asm_elementwise(
            "mul.rz.f32 $0, $1, 0f00800000;", "=r,r", [y], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        small = (tl.abs(y) * 8388608.0).to(tl.int32) | (bits_of(y) & -0x80000000)
        return tl.where(tl.abs(y) < 1.0, small, bits_of(y * TO_SUBNORMAL))


@triton.jit
def add_noise_byte(z, word, BYTE: tl.constexpr, FAST: tl.constexpr):
    """z + (byte + 1/2) / 256 of a 22-bit remainder, for byte number BYTE of ``word``; int32.

    FAST: one byte permutation puts the byte over a constant half, one multiply-add shifts and adds it.
    """
    if FAST:
        if BYTE == 0:
            ASM: tl.constexpr = (
                "{ .reg .b32 t; prmt.b32 t, $2, 0x80, 0x7704; mad.lo.s32 $0, t, 64, $1; }"
            )
        elif BYTE == 1:
            ASM: tl.constexpr = (
                "{ .reg .b32 t; prmt.b32 t, $2, 0x80, 0x7714; mad.lo.s32 $0, t, 64, $1; }"
            )
        elif BYTE == 2:
            ASM: tl.constexpr = (
                "{ .reg .b32 t; prmt.b32 t, $2, 0x80, 0x7724; mad.lo.s32 $0, t, 64, $1; }"
            )
        else:
            ASM: tl.constexpr = (
                "{ .reg .b32 t; prmt.b32 t, $2, 0x80, 0x7734; mad.lo.s32 $0, t, 64, $1; }"
            )
        return tl.inline_asm_elementwise(
            ASM, "=r,r,r", [z, word], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        return z + ((((word >> (8 * BYTE)) & 0xFF) << 14) | 0x2000).to(tl.int32)


@triton.jit
def limit_to(y, limit, FAST: tl.constexpr):
    """``y`` brought into [-limit, limit]. FAST: one instruction, the smaller magnitude with y's sign."""
    if FAST:
        return tl.inline_asm_elementwise(
            "min.xorsign.abs.f32 $0, $1, $2;",
            "=r,r,r",
            [y, limit],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    else:
        return tl.clamp(y, -limit, limit)


@triton.jit
def _floor_plus(y, u, unit):
    """Magnitudes floor(|y| / step + u) * step on the E2M1 grid times ``unit``, in fp32."""
    a = tl.abs(y)
    p = tl.maximum(float_of(bits_of(a) & EXPONENT_FIELD), unit)
    scaled = a * float_of(0x7F800000 - bits_of(p))  # times 2 / p, which is 1 / step
    return tl.floor(scaled + u) * (p * 0.5)


@triton.jit
def _floor_full(y, noise):
    """Magnitudes floor(|y| / step + noise * 2^-24) * step, exactly: 26-bit integers."""
    a = tl.abs(y)
    p = tl.maximum(float_of(bits_of(a) & EXPONENT_FIELD), 1.0)
    scaled = a * float_of(0x7F800000 - bits_of(p)) * 16777216.0
    n = (scaled.to(tl.int32) + noise) >> 24
    return n.to(tl.float32) * (p * 0.5)


@triton.jit
def with_sign(magnitude, y):
    """``magnitude`` with the sign bit of ``y``."""
    return float_of(bits_of(magnitude) | (bits_of(y) & -0x80000000))


@triton.jit
def nearest_e2m1(y, limit, unit, TIES: tl.constexpr, SIGNED: tl.constexpr, FAST: tl.constexpr):
    """fp32 ``y`` on the E2M1 grid times ``unit`` (a power of two), saturating at ``limit``, 6 units.

    SIGNED: a zero keeps the sign of ``y``; otherwise it may have any.
    """
    y = limit_to(y, limit, FAST)
    if TIES == "away":
        return with_sign(_floor_plus(y, ALMOST_HALF, unit), y)
    else:
        p = tl.maximum(float_of(bits_of(y) & EXPONENT_FIELD), unit)
        q = tl.fma(p, -MAGIC, tl.fma(p, MAGIC, y))
        if SIGNED:
            q = with_sign(q, y)
        return q


@triton.jit
def stochastic_full_e2m1(y, noise, FAST: tl.constexpr):
    """fp32 ``y`` on the E2M1 grid by 24 random bits (int32)."""
    y = limit_to(y, tl.zeros_like(y) + 6.0, FAST)
    return with_sign(_floor_full(y, noise), y)


@triton.jit
def stochastic_bits(y, word, BYTE: tl.constexpr, FAST: tl.constexpr):
    """Bits of ``y`` * 2^-126 plus eight random ones: sign, and the E2M1 magnitude from bit 22 upward.

    Not yet cut at bit 22 nor limited to 6, which ``stochastic_value`` and ``exact_word`` do.
    """
    return add_noise_byte(to_subnormal(y, FAST), word, BYTE, FAST)


@triton.jit
def stochastic_value(z, FAST: tl.constexpr):
    """The fp32 value of ``stochastic_bits``."""
    value = float_of(z & -0x400000) * FROM_SUBNORMAL
    return limit_to(value, tl.zeros_like(value) + 6.0, FAST)


@triton.jit
def e2m1_word(e, FAST: tl.constexpr):
    """Eight fp32 E2M1 values as 4-bit codes (sign << 3 | index) in one int32, the first one lowest.

    FAST: times 2^-6 they are E4M3 numbers whose codes are sign << 7 | index << 2; even and odd elements
    are converted into a word each, and bit selections bring them together.
    """
    s = ()
    for i in tl.static_range(8):
        s = s + (e[i] * (0.015625 if FAST else TO_SUBNORMAL),)
    if FAST:
        return tl.inline_asm_elementwise(
            """{ .reg .b16 l, h; .reg .b32 e, o, t, u;
            cvt.rn.satfinite.e4m3x2.f32 l, $3, $1; cvt.rn.satfinite.e4m3x2.f32 h, $7, $5;
            mov.b32 e, {l, h};
            cvt.rn.satfinite.e4m3x2.f32 l, $4, $2; cvt.rn.satfinite.e4m3x2.f32 h, $8, $6;
            mov.b32 o, {l, h};
            shl.b32 t, o, 2; lop3.b32 o, t, o, 0x70707070, 0xE4;
            shr.u32 t, e, 2; shr.u32 u, e, 4; lop3.b32 e, t, u, 0x07070707, 0xE4;
            lop3.b32 $0, o, e, 0xF0F0F0F0, 0xE4; }""",
            "=r,r,r,r,r,r,r,r,r",
            [s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7]],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    else:
        word = tl.zeros_like(bits_of(s[0]))
        for i in tl.static_range(8):
            z = bits_of(s[i])
            word = word | ((((z >> 22) & 7) | ((z >> 28) & 8)) << (4 * i))
        return word


@triton.jit
def exact_word(a, b, decode, BITS: tl.constexpr, FAST: tl.constexpr):
    """Two E2M1 elements of a block times its scale, exact bfloat16 numbers in one int32, ``a`` lower.

    Elements are fp32 values, or with BITS what ``stochastic_bits`` returns. FAST multiplies pairs: a
    product of a 2-bit and a 4-bit significand is exact in bfloat16.
    """
    if FAST:
        twice = (bits_of(decode) >> 16) & 0xFFFF
        twice = twice | (twice << 16)
        if BITS:
            # 0x7E80 is 2^126, 0x40C0 is 6
            return tl.inline_asm_elementwise(
                """{ .reg .b32 t, c; prmt.b32 t, $1, $2, 0x7632; and.b32 t, t, 0xFFC0FFC0;
                mov.b32 c, 0x7E807E80; mul.rn.bf16x2 t, t, c;
                mov.b32 c, 0x40C040C0; min.xorsign.abs.bf16x2 t, t, c; mul.rn.bf16x2 $0, t, $3; }""",
                "=r,r,r,r",
                [a, b, twice],
                dtype=tl.int32,
                is_pure=True,
                pack=1,
            )
        else:
            return tl.inline_asm_elementwise(
                "{ .reg .b32 t; cvt.rn.bf16x2.f32 t, $2, $1; mul.rn.bf16x2 $0, t, $3; }",
                "=r,r,r,r",
                [a, b, twice],
                dtype=tl.int32,
                is_pure=True,
                pack=1,
            )
    else:
        if BITS:
            a, b = stochastic_value(a, FAST), stochastic_value(b, FAST)
        return bf16_word(a * decode, b * decode)


@triton.jit
def bf16_word(a, b):
    """int32 word of two fp32 values that are bfloat16 numbers: their upper halves, ``a`` lower."""
    low = (bits_of(a).to(tl.uint32, bitcast=True) >> 16).to(tl.int32, bitcast=True)
    return low | (bits_of(b) & -0x10000)
