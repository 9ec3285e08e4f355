"""The block Hadamard rotation on tiles held in registers.

A tile is sixteen tensors [TB, BN], one a token: tensor i holds the tokens tb * 16 + i. So along the
tokens the first four butterfly stages pair whole tensors, with no data moved between threads; along the
columns a thread owns eight neighbours, and pairs them in place too. Only longer strides exchange values
between threads.

The order of operations is the definition (kernels and reference agree bit for bit): signs, then stages
(a, b) -> (a + b, a - b) at stride 1, 2, 4, ..., then times fp32(1 / sqrt(size)), then round to bf16.
"""

import triton
import triton.language as tl

from fp4_kernels.arith import bits_of, float_of, round_bf16

IN_TUPLE = tl.constexpr(16)
IN_THREAD = tl.constexpr(8)


@triton.jit
def inverse_sqrt(SIZE: tl.constexpr):
    """fp32(1 / sqrt(SIZE)) of the sizes offered."""
    if SIZE == 16:
        r: tl.constexpr = 0.25
    elif SIZE == 32:
        r: tl.constexpr = 0.17677669529663687
    elif SIZE == 64:
        r: tl.constexpr = 0.125
    else:
        r: tl.constexpr = 0.08838834764831845
    return r


@triton.jit
def sign_bit(signs_lo, signs_hi, j):
    """Bit j (below 128) of two 64-bit words, as int32."""
    word = tl.where(j < 64, signs_lo, signs_hi)
    return ((word >> (j % 64)) & 1).to(tl.int32)


@triton.jit
def signed(magnitude: tl.constexpr, bit):
    """+magnitude where ``bit`` is 0, -magnitude where it is 1."""
    return float_of(bits_of(tl.zeros_like(bit.to(tl.float32)) + magnitude) ^ (bit << 31))


@triton.jit
def _stage_across(h, Q: tl.constexpr):
    """One stage along axis 0 of h [n, m] at stride Q: partners sit in other threads."""
    n: tl.constexpr = h.shape[0]
    m: tl.constexpr = h.shape[1]
    h4 = tl.reshape(h, [n // (2 * Q), 2, Q, m])
    bits = bits_of(h4)
    # integers wrap, so the sum of a pair less one of them is the other one, bit for bit
    partner = float_of(tl.sum(bits, axis=1, keep_dims=True) - bits)
    second = tl.arange(0, 2)[None, :, None, None] == 1
    return tl.reshape(tl.where(second, partner - h4, h4 + partner), [n, m])


@triton.jit
def hadamard_tokens(
    xs, signs_lo, signs_hi,
    SIZE: tl.constexpr, SIGNS: tl.constexpr, FOLD: tl.constexpr, STAGES: tl.constexpr = 4,
):  # fmt: skip
    """Butterfly along the tokens of sixteen fp32 tensors [TB, BN]; not yet rounded to bf16.

    Token tb * 16 + i has sign (tb * 16 + i) % SIZE. FOLD: the first stage scales by 1 / sqrt(SIZE), a
    power of two. That changes no bit where the inputs are 16-bit floats, whose quarters are exact in
    fp32, except that sums beyond fp32's range before they are scaled stay finite.
    STAGES: how many of the first four are done (fewer only for SIZE 16).
    """
    UNIT: tl.constexpr = (0.25 if SIZE == 16 else 0.125) if FOLD else 1.0
    TB: tl.constexpr = xs[0].shape[0]
    tb = tl.arange(0, TB)[:, None]
    hs = ()
    for k in tl.static_range(8):
        a, b = xs[2 * k], xs[2 * k + 1]
        if SIGNS:
            # these products are exact, so sign, scale and first stage are one fused operation
            if SIZE == 16:
                s_a = signed(UNIT, sign_bit(signs_lo, signs_hi, 2 * k))
                s_b = signed(UNIT, sign_bit(signs_lo, signs_hi, 2 * k + 1))
            else:
                s_a = signed(UNIT, sign_bit(signs_lo, signs_hi, (tb * 16 + 2 * k) % SIZE))
                s_b = signed(UNIT, sign_bit(signs_lo, signs_hi, (tb * 16 + 2 * k + 1) % SIZE))
            b = b * s_b
            hs = hs + (tl.fma(a, s_a, b), tl.fma(a, s_a, -b))
        elif FOLD:
            b = b * UNIT
            hs = hs + (tl.fma(a, UNIT, b), tl.fma(a, UNIT, -b))
        else:
            hs = hs + (a + b, a - b)
    for stage in tl.static_range(1, STAGES):
        ys = ()
        for i in tl.static_range(16):
            if (i >> stage) & 1:
                ys = ys + (hs[i - (1 << stage)] - hs[i],)
            else:
                ys = ys + (hs[i] + hs[i + (1 << stage)],)
        hs = ys
    if SIZE > 16:
        hs = _across_tuple(hs, 1)
    if SIZE > 32:
        hs = _across_tuple(hs, 2)
    if SIZE > 64:
        hs = _across_tuple(hs, 4)
    return hs


@triton.jit
def _across_tuple(hs, Q: tl.constexpr):
    ys = ()
    for i in tl.static_range(len(hs)):
        ys = ys + (_stage_across(hs[i], Q),)
    return ys


@triton.jit
def hadamard_columns(x, signs_lo, signs_hi, SIZE: tl.constexpr, SIGNS: tl.constexpr):
    """Butterfly along axis 1 of fp32 x [TB, BN]; not yet scaled or rounded."""
    TB: tl.constexpr = x.shape[0]
    BN: tl.constexpr = x.shape[1]
    if SIGNS:
        n = tl.arange(0, BN)[None, :]
        x = x * signed(1.0, sign_bit(signs_lo, signs_hi, n % SIZE))
    hs = _split8(tl.reshape(x, [TB, BN // 8, 2, 2, 2]))
    for stage in tl.static_range(3):
        # position p holds column bits reversed: stride 2^stage is position bit 2 - stage
        ys = ()
        for p in tl.static_range(8):
            if (p >> (2 - stage)) & 1:
                ys = ys + (hs[p - (4 >> stage)] - hs[p],)
            else:
                ys = ys + (hs[p] + hs[p + (4 >> stage)],)
        hs = ys
    hs = _columns_across(hs, 1)
    if SIZE > 16:
        hs = _columns_across(hs, 2)
    if SIZE > 32:
        hs = _columns_across(hs, 4)
    if SIZE > 64:
        hs = _columns_across(hs, 8)
    return tl.reshape(_join8(hs), [TB, BN])


@triton.jit
def _columns_across(hs, Q: tl.constexpr):
    TB: tl.constexpr = hs[0].shape[0]
    M: tl.constexpr = hs[0].shape[1]
    second = tl.arange(0, 2)[None, None, :, None] == 1
    ys = ()
    for p in tl.static_range(8):
        h = tl.reshape(hs[p], [TB, M // (2 * Q), 2, Q])
        bits = bits_of(h)
        partner = float_of(tl.sum(bits, axis=2, keep_dims=True) - bits)
        ys = ys + (tl.reshape(tl.where(second, partner - h, h + partner), [TB, M]),)
    return ys


@triton.jit
def _split8(x):
    """[TB, M, 2, 2, 2] to eight [TB, M]; the last axis is the highest bit of the position."""
    a, b = tl.split(x)
    a0, a1 = tl.split(a)
    b0, b1 = tl.split(b)
    a00, a01 = tl.split(a0)
    a10, a11 = tl.split(a1)
    b00, b01 = tl.split(b0)
    b10, b11 = tl.split(b1)
    return (a00, a01, a10, a11, b00, b01, b10, b11)


@triton.jit
def _join8(hs):
    """The inverse of ``_split8``."""
    a = tl.join(tl.join(hs[0], hs[1]), tl.join(hs[2], hs[3]))
    b = tl.join(tl.join(hs[4], hs[5]), tl.join(hs[6], hs[7]))
    return tl.join(a, b)


@triton.jit
def split16(lower, upper):
    """Two [A, B, 8] as sixteen [A, B], one for each place in a block of sixteen."""
    A: tl.constexpr = lower.shape[0]
    B: tl.constexpr = lower.shape[1]
    a = _split8(tl.reshape(lower, [A, B, 2, 2, 2]))
    b = _split8(tl.reshape(upper, [A, B, 2, 2, 2]))
    a = (a[0], a[4], a[2], a[6], a[1], a[5], a[3], a[7])
    return a + (b[0], b[4], b[2], b[6], b[1], b[5], b[3], b[7])


@triton.jit
def join16(vs):
    """Sixteen [A, B] as [A, B * 16]."""
    A: tl.constexpr = vs[0].shape[0]
    B: tl.constexpr = vs[0].shape[1]
    a = _join8((vs[0], vs[4], vs[2], vs[6], vs[1], vs[5], vs[3], vs[7]))
    b = _join8((vs[8], vs[12], vs[10], vs[14], vs[9], vs[13], vs[11], vs[15]))
    both = tl.join(tl.reshape(a, [A, B, 8]), tl.reshape(b, [A, B, 8]))
    return tl.reshape(tl.permute(both, (0, 1, 3, 2)), [A, B * 16])


@triton.jit
def finish(h, SIZE: tl.constexpr, BF16: tl.constexpr, FAST: tl.constexpr):
    """Scale, and round where BF16 says so: what a copy is made of, in fp32."""
    h = h * inverse_sqrt(SIZE)
    if BF16:
        h = round_bf16(h, FAST)
    return h
