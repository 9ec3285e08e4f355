"""A GEMM of the Transformer Engine backend, casts and product, on the device before a run trusts it.

Which release is installed is not in our hands, and its kernels for Blackwell were never run by us. So each
GEMM of a recipe is tried once with small matrices: casts to nearest are the reference's bit for bit, a
stochastic one rounds to a neighbour and is right on average, products are those of the operands.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fp4pretrain.errors import first_line
from fp4pretrain.numerics import FORMATS, Noise, QuantSpec, quantize, signs_te
from fp4pretrain.ops.backend import Backend
from fp4pretrain.ops.casts import Cast
from fp4pretrain.ops.operand import Operand
from fp4pretrain.ops.reference import ReferenceBackend, oriented
from fp4pretrain.precision import OPERANDS, Gemm, Wgrad

# Tokens, input and output features: whole blocks of 128, and three different numbers.
_T, _K, _N = 256, 384, 512
# Hopper's FP8 tensor cores keep 13 bits at each of k / 32 additions; an FP32 result rounds to 2^-24.
_OFF = 2.0**-12 * (_N / 32)


def why_wrong(backend: Backend, gemm: Gemm, device: torch.device) -> str | None:
    """None if the backend makes the GEMM as the reference does, otherwise the reason in one clause."""
    name = type(gemm).__name__.lower()
    shapes = {"x": (_T, _K), "w": (_N, _K), "dy": (_T, _N)}
    made = []
    try:
        for i, (operand, spec) in enumerate(zip(OPERANDS[name], gemm.specs, strict=True)):
            x = _matrix(*shapes[operand], seed=i)
            turned = isinstance(gemm, Wgrad) or (name, operand) == ("dgrad", "w")
            cast = _cast(spec, gemm, turned)
            theirs = backend.quantize(x.to(device), [cast])[0]
            reason = _differs(theirs.dequantize().cpu(), x, cast)
            if reason is not None:
                return f"{operand} in {spec.format} {spec.block}: {reason}"
            made.append(theirs)
        return _product_is_off(backend, made[0], made[1], gemm)
    except torch.OutOfMemoryError:
        raise  # says nothing about the kernels
    except Exception as error:  # what its extension, torch or the driver raise is a refusal
        return (
            f"a self-check of its {name} raised {type(error).__name__}: {first_line(error)[:160]}"
        )


def _matrix(rows: int, cols: int, *, seed: int) -> Tensor:
    """BF16 with outliers, a block of zeros, and rows and columns of different magnitudes."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, cols, generator=g) * torch.exp2(torch.arange(rows) % 5)[:, None]
    x[:, ::29] *= 20
    x[:32, :32] = 0
    return x.bfloat16()


def _cast(spec: QuantSpec, gemm: Gemm, turned: bool) -> Cast:
    rotated = gemm.rotation.size if gemm.rotation.active else 0
    return Cast(
        spec=spec,
        transpose=turned,
        multiple=gemm.contraction_multiple,
        rotation_size=rotated,
        signs=tuple(signs_te()) if rotated else None,
        noise=Noise(key=7) if spec.stochastic else None,
    )


def _differs(theirs: Tensor, x: Tensor, cast: Cast) -> str | None:
    """What is wrong with an operand of x, fp32 [rows, k] on the CPU."""
    if not cast.spec.stochastic:
        ours = ReferenceBackend().quantize(x, [cast])[0].dequantize()
        if theirs.shape != ours.shape:
            return f"its cast is {list(theirs.shape)}, ours {list(ours.shape)}"
        wrong = int((theirs != ours).sum())
        return f"{wrong} of {ours.numel()} elements differ from ours" if wrong else None
    nearest = QuantSpec(cast.spec.format, cast.spec.block, scale=cast.spec.scale)
    turned = oriented(x, cast).float()
    q = quantize(turned, nearest)
    assert q.scales is not None
    tall, wide = q.spec.block_shape(q.shape)
    scales = q.scales.float().repeat_interleave(tall, 0).repeat_interleave(wide, 1) * q.alpha()
    scales = scales.clamp(min=torch.finfo(torch.float32).tiny)
    want, got = turned / scales, theirs / scales
    magnitude = want.abs()
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    error = (got - want) / step
    if (error.abs() > 1.001).any():
        return "its stochastic rounding leaves the two neighbours"
    # Where a value lies between its neighbours must not move it on average: nearest rounding fails that
    middle = (magnitude / step).frac() - 0.5
    inside = magnitude < FORMATS[cast.spec.format].element.max
    drift = (error * torch.sign(want) * middle)[inside]
    for found, largest in ((drift, 0.25), (error[inside], 0.5)):
        if found.mean().abs() > 6 * largest / found.numel() ** 0.5:
            return "its stochastic rounding is wrong on average"
    return None


def _product_is_off(backend: Backend, a: Operand, b: Operand, gemm: Gemm) -> str | None:
    """Products in BF16 and added in FP32, against float64 ones of the same operands."""
    av, bv = a.dequantize().double(), b.dequantize().double()
    want, magnitude = av @ bv.t(), av.abs() @ bv.abs().t()
    start = torch.ones(want.shape, device=av.device)
    fast = gemm.fast_accum
    plain = backend.gemm(a, b, out_dtype=torch.bfloat16, fast_accum=fast).double()
    added = backend.gemm(
        a, b, out_dtype=torch.float32, accumulate_into=start.clone(), fast_accum=fast
    )
    for got, exact, ulp in ((plain, want, 2.0**-8), (added.double(), want + 1, 2.0**-23)):
        if not ((got - exact).abs() <= magnitude * _OFF + exact.abs() * ulp).all():
            return "its product of a self-check is not that of its operands"
    return None
