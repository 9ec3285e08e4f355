"""A process in which Triton interprets kernels on CPU tensors: reads case names, answers with mismatches.

The interpreter is switched on by an environment variable that Triton reads as kernels are defined, so it
needs a process of its own: ``python interpreted.py`` with TRITON_INTERPRET=1.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from adam_laws import ADAM_CASES, check_adam
from backend_laws import alphas_differ, check_operands
from dot_scaled import provide
from fp4_kernels import amax as amax_kernels
from fp4_kernels.quantize import Quantized, quantize
from fp4_kernels.spec import Copy, Noise, Turn, draw_words
from fp4_kernels.unpack import unpack, unpack_e4m3
from function_laws import FUNCTION_CASES, check_function
from fused_laws import FUSED_CASES, check_fused
from gemm_laws import BLOCK_GEMMS, check_block_gemm, check_block_linear, check_native
from inputs import INPUTS, sample
from patch_once import patch_once

from fp4pretrain import numerics
from fp4pretrain.ops import Cast, triton_backend
from fp4pretrain.ops.reference import ReferenceBackend
from fp4pretrain.ops.triton_backend import TritonBackend

provide()
patch_once()
TE = numerics.signs_te()
NOISE = Noise(0x9E3779B97F4A7C15, 7, 48)
GAPS = Noise(5, 3, 32, row_part=24, row_gap=40, col_part=64, col_gap=128)
SR = dict(rounding="stochastic", noise=NOISE)

COPIES: dict[str, Copy] = {
    **{f"nvfp4 {s}": Copy("nvfp4", scale=s) for s in ("default", "unbiased", "four_over_six")},
    "nvfp4 cap256 away": Copy("nvfp4", scale="cap256", ties="away"),
    "nvfp4 2d": Copy("nvfp4", block="2d"),
    "nvfp4 2d four_over_six": Copy("nvfp4", block="2d", scale="four_over_six"),
    "nvfp4 H16 signs SR": Copy("nvfp4", rotation=16, signs=TE, **SR),
    "nvfp4 H128 SR gaps": Copy("nvfp4", rotation=128, rounding="stochastic", noise=GAPS),
    "nvfp4 SR full": Copy("nvfp4", rounding="stochastic_full", noise=NOISE),
    **{f"mxfp4 {s}": Copy("mxfp4", scale=s) for s in ("floor", "ceil", "even", "rceil")},
    "mxfp4 2d": Copy("mxfp4", block="2d", scale="even"),
    "mxfp4 H32 unbiased SR": Copy("mxfp4", rotation=32, scale="unbiased", **SR),
    "mxfp4 H64 signs": Copy("mxfp4", rotation=64, signs=TE * 4),
    "mxfp4 H16 in fp32": Copy("mxfp4", rotation=16, scale="even", rotated_fp32=True),
    "nvfp4 H32 in fp32": Copy("nvfp4", rotation=32, rotated_fp32=True),
    "mxfp8 rceil": Copy("mxfp8", scale="rceil"),
    "mxfp8_e5m2 2d": Copy("mxfp8_e5m2", block="2d"),
    **{f"fp8_e4m3 {b}": Copy("fp8_e4m3", b) for b in ("tensor", "row", "1d", "2d")},
    "fp8_e5m2 pow2": Copy("fp8_e5m2", "tensor", scale="pow2"),
}
ALONE = [
    COPIES[name]
    for name in (
        "nvfp4 default",
        "nvfp4 2d",
        "mxfp4 H32 unbiased SR",
        "mxfp8 rceil",
        "fp8_e4m3 row",
    )
]
LINE_CASES = ("line amax plain", "line amax plain signed", "line amax nan")
AMAX_CASES = tuple(
    f"amax {sizes}"
    for sizes in ("0 0", "0 16", "0 32", "0 64", "16 32", "16 64", "64 64", "16 128", "128 0")
)
DRAWN_CASES = (
    "drawn nvfp4_H16_signs_SR",
    "drawn nvfp4_SR_full",
    "drawn mxfp4_H64_signs",
)
SAVED_CASES = ("saved nvfp4 fp8", "saved mxfp4 fp8", "saved mxfp4 bf16")
E4M3_CASES = ("e4m3 near", "e4m3 far", "e4m3 near 2d", "e4m3 far 2d")


def amaxes(x: torch.Tensor, copy: Copy) -> tuple:
    """(row, col) amaxes as ``copy`` needs them, from the kernels."""
    turn = copy.turn
    if copy.amax == "none":
        return None, None
    measure = amax_kernels.amax if copy.amax == "tensor" else amax_kernels.line_amax
    found = measure(x, row=turn, col=turn)
    return found[0], found[1]


def flushed(x: torch.Tensor) -> torch.Tensor:
    """fp32; on a CPU without subnormals, which the interpreter loses in bfloat16."""
    x = x.float()
    return x if x.is_cuda else x.masked_fill(x.abs() < 2.0**-126, 0)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1).view(torch.uint8).reshape(*x.shape, -1)


def differ(name: str, got: torch.Tensor, want: torch.Tensor, *, allowed: int = 0) -> list[str]:
    """The first mismatching element and their number; NaN equals NaN."""
    if got.shape != want.shape:
        return [f"{name}: shape {list(got.shape)}, not {list(want.shape)}"]
    wrong = (got != want) & ~((got != got) & (want != want))
    if wrong.sum() <= allowed:
        return []
    at = tuple(wrong.nonzero()[0].tolist())
    return [f"{name}: {int(wrong.sum())} differ, first {at}: {got[at]}, not {want[at]}"]


def check_copy(copy: Copy, kind: str, *, device: str = "cpu", times: int = 1) -> list[str]:
    """Row and column copy of one launch against numerics: codes, scales, alpha, amax, exact values."""
    unit = max(copy.rotation, copy.block_length, 16)
    shape = (unit, unit) if unit > 48 else (3 * unit, 2 * unit + unit * (unit < 32))
    shape = (shape[0] * times, shape[1] * times)
    x = sample(kind, shape, seed=len(kind)).to(device)
    amax = amaxes(x, copy)
    other = torch.tensor(0.7, device=device)  # alpha of what the copies will be multiplied with
    partners = other, other * 3
    made = quantize(x, row=copy, col=copy, row_amax=amax[0], col_amax=amax[1], partners=partners)
    values: tuple = (None, None)
    if kind != "plain":
        exact = replace(copy, output="exact")
        values = quantize(x, row=exact, col=exact, row_amax=amax[0], col_amax=amax[1])
    # in the interpreter, which is slow, of the copies between which the kernels differ in shape
    bad = same_alone(x, copy, amax, made) if device == "cuda" or copy in ALONE else []
    for name, source, got, value in zip(("row", "col"), (x, x.t()), made, values, strict=True):
        if copy.rotation:
            source = numerics.rotate(
                source, size=copy.rotation, signs=copy.signs, round_bf16=not copy.rotated_fp32
            )
        bad += check_one(name, copy, source.contiguous(), got, value)
    for name, got, partner in zip(("row", "col"), made, partners, strict=True):
        if got.alpha is not None:
            bad += differ(f"{name} paired", got.paired, got.alpha * partner)
    return bad


def same_alone(x: torch.Tensor, copy: Copy, amax: tuple, pair: tuple, **lost: Any) -> list[str]:
    """A copy made alone has every bit of the one made beside another."""
    row = quantize(x, row=copy, row_amax=amax[0], **lost)[0]
    col = quantize(x, col=copy, col_amax=amax[1], **lost)[1]
    bad = []
    for name, one, other in zip(("row", "col"), (row, col), pair, strict=True):
        for part in ("out", "scales", "alpha"):
            a, b = getattr(one, part), getattr(other, part)
            if (a is None) != (b is None) or (a is not None and not torch.equal(bits(a), bits(b))):
                bad.append(f"{name} alone: other {part}")
    return bad


def check_one(
    name: str, copy: Copy, x: torch.Tensor, got: Quantized, value: Quantized | None
) -> list[str]:
    spec = numerics.QuantSpec(copy.format, copy.block, copy.rounding, copy.ties, copy.scale)
    noise = numerics.Noise(**vars(copy.noise)) if copy.noise else None
    want = numerics.quantize(x, spec, noise=noise)
    packed = want.codes.dtype == torch.uint8
    codes = (got.out, want.codes) if packed else (got.out.float(), want.codes.float())
    # The reference adds 8-bit noise in fp32, which lifts a digit where less than 2^-25 of it is missing
    allowed = int(1e-6 * x.numel()) if copy.rounding == "stochastic" else 0
    bad = differ(f"{name} codes", *codes, allowed=allowed)
    if got.scales is not None:
        bad += differ(f"{name} scales", bits(got.scales), bits(want.scales))
    if got.alpha is not None:
        bad += differ(f"{name} alpha", got.alpha, want.alpha())
    if value is not None and spec.exact_in_bf16 and not copy.format.startswith("fp8"):
        # a NaN block scale makes every element NaN, whatever was rounded under it
        bad += differ(f"{name} values", flushed(value.out), flushed(want.values()))
    if value is not None and packed:
        bad += differ(
            f"{name} unpack", flushed(unpack(want.codes, want.scales)), flushed(want.values())
        )
    return bad


def check_e4m3(spread: str, block: str = "1d", *, device: str = "cpu") -> list[str]:
    """MXFP4 under row factors: exact up to 2^14 under the row's largest block, else counted."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(64, 128, generator=g)
    exponents = torch.randint(0, 12 if spread == "near" else 40, (2, 4), generator=g).float()
    x *= torch.exp2(-exponents).repeat_interleave(32, 0).repeat_interleave(32, 1)
    x = x.bfloat16().to(device)
    copy = Copy("mxfp4", block, scale="even", output="e4m3")
    lost = torch.zeros(2, dtype=torch.int64, device=device)
    amax = amaxes(x, copy)
    if block == "2d":  # the rows of a tile share its scale, so they take one factor
        amax = tuple(a.view(-1, 32).amax(dim=1).repeat_interleave(32) for a in amax)
    made = quantize(x, row=copy, col=copy, row_amax=amax[0], col_amax=amax[1], lost=lost)
    counted = torch.zeros_like(lost)
    bad = same_alone(x, copy, amax, made, lost=counted)
    bad += differ("lost of copies alone", counted, lost)
    for i, (source, got) in enumerate(zip((x, x.t().contiguous()), made, strict=True)):
        want = numerics.quantize(source, numerics.QuantSpec("mxfp4", block, scale="even")).values()
        wrong = int((got.out.float() * got.scales[:, None] != want).sum())
        if wrong != int(lost[i]):
            bad.append(f"copy {i}: {wrong} elements inexact, {int(lost[i])} counted")
        if (wrong == 0) != (spread == "near"):
            bad.append(f"copy {i}: {wrong} elements inexact in the {spread} case")
        packed = quantize(source, row=replace(copy, output="codes"))[0]
        counted = torch.zeros((), dtype=torch.int64, device=device)
        values, factors = unpack_e4m3(packed.out, packed.scales, lost=counted)
        bad += differ(f"copy {i} factors", factors, got.scales)
        again = int((values.float() * factors[:, None] != want).sum())
        if not again == int(counted) == wrong:
            bad.append(f"copy {i}, unpacked: {again} inexact, {int(counted)} counted, not {wrong}")
    return bad


def check_line_amax(kind: str, signed: str, *, device: str = "cpu") -> list[str]:
    """The largest magnitude of every row and column, both rotated by 16; edges that hang over tiles."""
    x = sample(kind, (80, 144), 4).to(device)
    signs = numerics.signs_te() if signed == "signed" else None
    got = amax_kernels.line_amax(x, row=Turn(16, signs), col=Turn(16, signs))
    turn = None if signs is None else torch.tensor(signs, device=device)
    bad = []
    for name, source, found in zip(("row", "col"), (x, x.t()), got, strict=True):
        turned = numerics.rotate(source.float().contiguous(), size=16, signs=turn)
        want = turned.abs().amax(dim=1)  # NaN where one is in the row
        bad += differ(name, found, want.masked_fill(turned.isnan().any(dim=1), torch.nan))
    return bad


def check_drawn(name: str, *, device: str = "cpu") -> list[str]:
    """Key and signs read from memory give the copy, and the amaxes, that they give as arguments."""
    copy = COPIES[name.replace("_", " ")]
    words = draw_words(copy.noise.key if copy.noise else 0, copy.signs)
    draw = torch.tensor(words, device=device)
    # what the arguments say then counts for nothing
    signs = None if copy.signs is None else tuple(-s for s in copy.signs)
    noise = None if copy.noise is None else replace(copy.noise, key=copy.noise.key ^ 0x5A5A)
    drawn = copy.drawn(noise, signs, draw)
    unit = max(copy.rotation, copy.block_length, 16)
    x = sample("plain", (unit, 2 * unit) if unit > 48 else (3 * unit, 2 * unit), 7).to(device)
    bad = []
    found = [amaxes(x, one) for one in (copy, drawn)]
    made = [
        quantize(x, row=one, col=one, row_amax=amax[0], col_amax=amax[1])
        for one, amax in zip((copy, drawn), found, strict=True)
    ]
    for side, want, got in zip(("row", "col"), *made, strict=True):
        assert want is not None and got is not None
        bad += differ(side, bits(got.out), bits(want.out))
    for side, first, second in zip(("row", "col"), *found, strict=True):
        bad += [] if first is None else differ(f"{side} amax", second, first)
    return bad


def check_amaxes(row: str, col: str, *, device: str = "cpu") -> list[str]:
    """Amaxes of x rotated by ``row`` and of its transpose by ``col``: of the whole and of each line."""
    x = sample("plain", (256, 384) if device == "cuda" else (128, 128), 5).to(device)
    sizes = int(row), int(col)
    turns = tuple(Turn(size) for size in sizes)
    whole = amax_kernels.amax(x, row=turns[0], col=turns[1])
    lines = amax_kernels.line_amax(x, row=turns[0], col=turns[1])
    bad = []
    alone = amax_kernels.line_amax(x, row=turns[0], col=None)[0]
    bad += differ("rows alone", alone, lines[0])
    bad += differ("columns alone", amax_kernels.line_amax(x, row=None, col=turns[1])[1], lines[1])
    for i, (source, size) in enumerate(zip((x, x.t()), sizes, strict=True)):
        turned = source.float().contiguous()
        if size:
            turned = numerics.rotate(turned, size=size, signs=None)
        want = turned.abs().amax(dim=1)
        bad += differ(f"lines {i}", lines[i], want) + differ(f"all {i}", whole[i], want.max())
    return bad


def check_saved(format_: str, carrier: str) -> list[str]:
    """What the backend saves for the backward pass is packed, and expands to the reference's numbers. A later
    cast that is told of it makes the product of both alphas."""
    triton_backend._has_fp8_rows = lambda _: True  # as on Hopper
    x = sample("plain", (96, 160), 6)
    spec = numerics.QuantSpec(format_)
    casts = [Cast(spec), Cast(spec, transpose=True, saved=True)]
    saved = TritonBackend(mxfp4_emulation=carrier).quantize(x, casts)[1]
    want = ReferenceBackend().quantize(x, casts)[1]
    size = sum(v.numel() * v.element_size() for v in (saved.data, saved.scales))
    bad = [] if size < 0.3 * 2 * x.numel() else [f"{size} bytes are saved of {x.numel()} elements"]
    in_fp8 = saved.expanded().data.dtype == torch.float8_e4m3fn
    if in_fp8 != (format_ == "mxfp4" and carrier == "fp8"):
        bad.append(f"expanded to {saved.expanded().data.dtype}")
    if in_fp8:
        counter, counted = torch.zeros((), dtype=torch.int64), []
        far = replace(saved, scales=saved.scales.clone(), lost=counter)
        far.scales.view(torch.uint8)[:, 0] -= 20  # a block far under its row's largest
        for _ in range(2):
            far.expanded()
            counted.append(int(counter))
        bad += [] if 0 < counted[0] == counted[1] else [f"elements counted twice: {counted}"]
    turned = saved.transposed()
    bad += differ("turned", turned.dequantize(), want.dequantize().t()) if turned else []
    if (turned is None) != in_fp8:
        bad.append("not turned" if turned is None else "E4M3 under one factor a row is turned")
    turned = Cast(spec, transpose=True)
    (dy,) = TritonBackend(mxfp4_emulation=carrier).quantize(x, [turned], None, [saved])
    bad += alphas_differ("wgrad", dy, saved)
    return bad + differ("saved", saved.dequantize(), want.dequantize())


def check_seam(name: str, parallel: str, shape: str, carrier: str) -> list[str]:
    """The backend's operands of a sharded linear, as a run makes them, beside the reference's."""
    triton_backend._has_fp8_rows = lambda _: True  # as on Hopper
    sizes = tuple(int(n) for n in shape.split("x"))
    backend = TritonBackend(mxfp4_emulation=carrier)
    return check_operands(name.replace("_", " "), sizes, parallel=parallel, backend=backend)


SEAM_CASES = (
    "seam nvfp4 column 32x64x96 fp8",
    "seam mxfp4_unbiased row 32x64x64 fp8",
    "seam mxfp4 column 32x64x96 fp8",
    "seam mxfp4_2d row 32x64x64 fp8",
    "seam mxfp8 column 32x64x96 fp8",
    "seam fp8 row 32x64x64 fp8",
    "seam fp8_row column 32x64x96 fp8",
    "seam fp8_row row 32x64x96 fp8",
    "seam fp8_block column 128x128x256 fp8",
    # sizes that blocks, tiles and rotations do not divide
    "seam nvfp4 column 30x72x104 fp8",
    "seam mxfp4_2d column 40x72x104 bf16",
    "seam mxfp4_unbiased column 50x88x72 bf16",
    "seam fp8 column 30x40x72 fp8",
)


def check_registry(part: str) -> list[str]:
    """Every cast that the backend says it makes is the reference's; what it does not make it refuses
    in one clause. Generated from the table of formats: a new row is asked for here at once."""
    triton_backend._has_fp8_rows = lambda _: True  # as on Hopper
    g = torch.Generator().manual_seed(2)
    x = (torch.randn(32, 64, generator=g) * 2).bfloat16()
    noise = numerics.Noise(3, 5, 32)
    bad = []
    for spec in numerics.every_spec()[int(part) :: 2]:
        reason = TritonBackend().why_not_cast(spec, x.device)
        if reason is not None:
            bad += [f"{spec}: no clause: {reason!r}"] if "\n" in reason or not reason else []
            continue
        cast = Cast(spec, multiple=16, noise=noise if spec.stochastic else None)
        (mine,), (want,) = (b.quantize(x, [cast]) for b in (TritonBackend(), ReferenceBackend()))
        # blocks of 128 may be padded further by one of the two
        values, truth = (operand.dequantize()[:, : x.shape[1]] for operand in (mine, want))
        wrong = int((values != truth).sum())
        bad += [f"{spec}: {wrong} values differ"] if wrong else []
    return bad


def line_case(name: str) -> tuple[str, str]:
    """(kind of input, signed or nothing) of one of LINE_CASES."""
    kind, *signed = name.split()[2:]
    return kind, "".join(signed)


def cases() -> dict[str, Callable[[], list[str]]]:
    found = {f"{c} {k}": partial(check_copy, COPIES[c], k) for c in COPIES for k in ("plain",)}
    some = ("nvfp4 default", "mxfp4 rceil")
    found |= {f"{c} {k}": partial(check_copy, COPIES[c], k) for c in some for k in INPUTS[1:]}
    rare = (("nvfp4 2d", "tiny"), ("mxfp8 rceil", "nan"), ("fp8_e4m3 tensor", "inf"))
    found |= {f"{c} {k}": partial(check_copy, COPIES[c], k) for c, k in rare}
    found |= {name: partial(check_e4m3, *name.split()[1:]) for name in E4M3_CASES}
    found |= {name: partial(check_line_amax, *line_case(name)) for name in LINE_CASES}
    found |= {name: partial(check_amaxes, *name.split()[1:]) for name in AMAX_CASES}
    found |= {name: partial(check_drawn, *name.split()[1:]) for name in DRAWN_CASES}
    found |= {name: partial(check_fused, name) for name in FUSED_CASES}
    found |= {f"adam {name}": partial(check_adam, name) for name in ADAM_CASES}
    found |= {name: partial(check_function, *name.split()[1:]) for name in FUNCTION_CASES}
    found |= {name: partial(check_saved, *name.split()[1:]) for name in SAVED_CASES}
    found |= {name: partial(check_seam, *name.split()[1:]) for name in SEAM_CASES}
    found |= {f"registry {part}": partial(check_registry, part) for part in "01"}
    found["block linear"] = check_block_linear
    found |= {name: partial(check_block_gemm, *name.split()[2:]) for name in BLOCK_GEMMS}
    found["native mxfp8"] = partial(check_native, False, "mxfp8")
    return found | {f"native {a}": partial(check_native, a == "add") for a in ("store", "add")}


def main() -> None:
    warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy, of 1 / 0 in zero blocks
    torch.set_num_threads(1)
    todo = cases()
    for line in sys.stdin:
        try:
            answer = todo[line.strip()]()
        except Exception:
            answer = [traceback.format_exc()[-3000:]]
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
