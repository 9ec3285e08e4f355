"""Noise for stochastic rounding: a function of who asks and of which element, never a state.

Philox4x32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) turns a 64-bit
key and a 128-bit counter into four random words. The key names the draw (seed, step, microbatch,
layer, GEMM, operand: ``derive_key``), the counter names the element by its global coordinates. So
activation recompute, a resumed run and another parallel layout all draw the same noise.

    rounding          counter (c0, c1, c2, c3)              what an element gets
    stochastic        (col // 16, row, 0, 0)  byte col%16    u = (byte + 0.5) / 256
    stochastic_full   (col // 4,  row, 1, 0)  word col%4     u = (word >> 8) * 2^-24
    random signs      (0, 0, 2, 0)            bit j          sign j is - where the bit is set

Byte j of a call is byte j % 4 (lowest first) of word j // 4. Row and col are those of the tensor
that is quantized (for a column-wise copy, of the transpose) plus the offsets of ``Noise``. Seven
rounds are the fewest that pass BigCrush (their table 2); the tests hold the ten-round version to
the published vectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fp4pretrain.numerics.blocks import row_slices

ROUNDS = 7
_MASK32 = 0xFFFFFFFF
_MASK64 = 0xFFFFFFFFFFFFFFFF
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_BYTES_STREAM, _WORDS_STREAM, _SIGNS_STREAM = 0, 1, 2

Word = int | Tensor


@dataclass(frozen=True)
class Noise:
    """A 64-bit key, and where the tensor at hand sits in the global one (in its own rows, cols).

    Local row r is global row ``row_offset + r``. Where a shard is made of several parts that are
    apart in the whole (tensor-parallel SwiGLU holds a piece of the gate and one of the up
    projection), ``row_part`` is the length of a part and each further part is ``row_gap`` rows
    further on: ``row_offset + r + (r // row_part) * row_gap``. Columns likewise; column parts are
    whole calls.
    """

    key: int
    row_offset: int = 0
    col_offset: int = 0
    row_part: int = 0
    row_gap: int = 0
    col_part: int = 0
    col_gap: int = 0


def derive_key(seed: int, *path: int) -> int:
    """A 64-bit key from a seed and any integers, order mattering: a chain of splitmix64 steps.

    ``h = mix(seed); h = mix(h ^ v)`` for each v, with splitmix64's increment and finalizer (Steele,
    Lea, Flood, OOPSLA 2014) as ``mix``; integers are taken modulo 2^64.
    """
    state = 0
    for value in (seed, *path):
        state = ((state ^ (value & _MASK64)) + 0x9E3779B97F4A7C15) & _MASK64
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK64
        state ^= state >> 31
    return state


def derive_keys(seed: int, *path: int | Tensor) -> Tensor:
    """``derive_key`` of many paths at once: the keys' bits, int64 [n], of integers and int64 tensors [n]."""
    state = torch.zeros((), dtype=torch.int64)
    for value in (seed, *path):
        mixed = value if isinstance(value, Tensor) else torch.tensor(_as_signed(value))
        state = (state ^ mixed) + _as_signed(0x9E3779B97F4A7C15)
        state = (state ^ _shifted(state, 30)) * _as_signed(0xBF58476D1CE4E5B9)
        state = (state ^ _shifted(state, 27)) * _as_signed(0x94D049BB133111EB)
        state = state ^ _shifted(state, 31)
    return state


def _as_signed(word: int) -> int:
    word &= _MASK64
    return word - (1 << 64) if word >> 63 else word


def _shifted(bits: Tensor, by: int) -> Tensor:
    """A logical shift to the right: int64's own carries the sign along."""
    return (bits >> by) & ((1 << (64 - by)) - 1)


def philox(
    counter: tuple[Word, Word, Word, Word], key: Word, *, rounds: int = ROUNDS
) -> tuple[Word, Word, Word, Word]:
    """Philox4x32: four 32-bit words from a counter of four 32-bit words and a 64-bit key.

    Words are Python integers or int64 tensors that broadcast together. A counter that is a column
    of rows and a row of columns stays small for the first rounds: only the last ones see every
    pair.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & _MASK32, (key >> 32) & _MASK32
    for _ in range(rounds):
        # int64 products wrap modulo 2^64; the shift is arithmetic, so the mask comes last. c1 and
        # c3 carry their product's high half along: it is only ever XORed in before that mask.
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1
        c0, c2 = (product_1 >> 32) ^ c1, (product_0 >> 32) ^ c3
        c0 ^= k0
        c0 &= _MASK32
        c2 ^= k1
        c2 &= _MASK32
        c1, c3 = product_1, product_0
        k0, k1 = (k0 + _WEYL_0) & _MASK32, (k1 + _WEYL_1) & _MASK32
    return c0, c1 & _MASK32, c2, c3 & _MASK32


def _apart(index: Tensor, part: int, gap: int) -> Tensor:
    """Indices with ``gap`` left out after every ``part`` (no parts: 0)."""
    return index + index // part * gap if part else index


def _words(
    noise: Noise, shape: tuple[int, int], *, per_call: int, stream: int, device: torch.device
) -> tuple[Tensor, int]:
    """int32 [rows, calls * 4] random words covering ``shape``, and how many columns to skip."""
    rows, cols = shape
    first, skip = divmod(noise.col_offset, per_call)
    calls = -(-(skip + cols) // per_call)
    call_c = torch.arange(calls, device=device)
    call_c = first + _apart(call_c, noise.col_part // per_call, noise.col_gap // per_call)
    row_r = _apart(torch.arange(rows, device=device), noise.row_part, noise.row_gap)
    row_r1 = (noise.row_offset + row_r)[:, None]
    out = torch.empty(rows, calls, 4, dtype=torch.int32, device=device)
    for part in row_slices((rows, 4 * calls), 1, device):
        words = philox((call_c, row_r1[part], stream, 0), noise.key)
        for index, word in enumerate(words):
            out[part, :, index] = word  # keeps the low 32 bits
    return out.view(rows, calls * 4), skip


def noise_bytes(noise: Noise, shape: tuple[int, int], device: torch.device) -> Tensor:
    """uint8 [rows, cols]: the byte k of every element (``rounding=stochastic``)."""
    words, skip = _words(noise, shape, per_call=16, stream=_BYTES_STREAM, device=device)
    return words.view(torch.uint8)[:, skip : skip + shape[1]]


def noise_words(noise: Noise, shape: tuple[int, int], device: torch.device) -> Tensor:
    """int64 [rows, cols]: the upper 24 bits of every element's word (``stochastic_full``)."""
    words, skip = _words(noise, shape, per_call=4, stream=_WORDS_STREAM, device=device)
    return (words[:, skip : skip + shape[1]].long() & _MASK32) >> 8


def random_sign_words(keys: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """``random_signs`` of many keys, int64 [n]: in the first int64 [n] bit j is set where sign j is -1, in
    the second where sign 64 + j is."""
    words = philox((0, 0, _SIGNS_STREAM, 0), keys)
    low, high = (first | (second << 32) for first, second in (words[:2], words[2:]))
    kept = [_as_signed((1 << max(0, min(64, size - start))) - 1) for start in (0, 64)]
    return torch.as_tensor(low) & kept[0], torch.as_tensor(high) & kept[1]


def random_signs(key: int, size: int) -> tuple[int, ...]:
    """``size`` (at most 128) signs of +1 or -1 drawn from the key: one Philox call."""
    words = philox((0, 0, _SIGNS_STREAM, 0), key)
    return tuple(-1 if int(words[j // 32]) >> (j % 32) & 1 else 1 for j in range(size))
