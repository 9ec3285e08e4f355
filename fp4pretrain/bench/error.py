"""What casts lose: mean squared error, cosine and bias on Gaussian and heavy-tailed matrices. No GPU.

The columns, for a matrix x and its cast q(x):

- ``mse``: mean (q(x) - x)^2 for x from N(0, 1), the number that papers print times 1000 (arXiv:2601.22813:
  9.0 nearest 1x16, 7.6 Four Over Six, 12.4 16x16, 23.5 stochastic and unbiased, 9.4 MS-EDEN).
- ``cosine`` of the angle between x and q(x).
- ``bias``: of the mean over draws: |mean q(x) - x| / |x| after ``DRAWS`` draws of the noise (and of the
  rotation, for casts that are unbiased over rotations). Where the noise averages out it falls as
  1/sqrt(draws); ``draw`` is the same for one draw.
- ``heavy``: relative mean squared error, |q(x) - x|^2 / |x|^2, where x is Student's t with 3 degrees of
  freedom; ``rotated``: the same after a random Hadamard rotation of 128 elements.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fp4pretrain.numerics import (
    Noise,
    QuantSpec,
    cosine,
    derive_key,
    emulate,
    every_spec,
    random_signs,
    relative_error,
    rotate,
)

SHAPE = (1024, 2048)
DRAWS = 16
ROTATION = 128
# Casts that papers print an error of, in their order, then the shipped recipes' others.
SPECS = (
    QuantSpec("nvfp4"),
    QuantSpec("nvfp4", scale="four_over_six"),
    QuantSpec("nvfp4", "2d"),
    QuantSpec("nvfp4", rounding="stochastic", scale="unbiased"),
    QuantSpec("nvfp4", rounding="stochastic"),
    QuantSpec("nvfp4", rounding="eden"),
    QuantSpec("nvfp4_local"),
    QuantSpec("nvfp4_double"),
    QuantSpec("ue5m3"),
    QuantSpec("ue5m3", "1d32"),
    QuantSpec("mxfp4"),
    QuantSpec("mxfp4", scale="even"),
    QuantSpec("mxfp4", scale="rceil"),
    QuantSpec("mxfp4", scale="full_grid"),
    QuantSpec("mxfp4", rounding="stochastic", scale="unbiased"),
    QuantSpec("int4"),
    QuantSpec("mxfp6_e2m3"),
    QuantSpec("mxfp6_e3m2"),
    QuantSpec("mxfp8"),
    QuantSpec("fp8_e4m3"),
    QuantSpec("fp8_e5m2"),
    QuantSpec("bf16"),
)


def bench_error(*, every: bool = False, seed: int = 1) -> dict[str, Any]:
    """{rows: [{spec, mse, cosine, draw, bias, heavy, rotated}], shape, draws, seed}.

    ``every``: all casts that the tables of formats, roundings and scale rules offer.
    """
    g = torch.Generator().manual_seed(seed)
    normal = torch.randn(SHAPE, generator=g)
    chi = torch.randn(3, *SHAPE, generator=g).square_().sum(dim=0)
    heavy = torch.randn(SHAPE, generator=g) / (chi / 3).sqrt()
    turned = rotate(heavy, size=ROTATION, signs=_signs(0), round_bf16=False)
    rows = []
    for spec in every_spec() if every else SPECS:
        y = _cast(normal, spec, draw=0)
        row = {
            "spec": _name(spec),
            "mse": float((y.double() - normal.double()).square().mean()),
            "cosine": float(cosine(normal, y)),
        }
        if spec.stochastic:
            small = normal[:128, :512].contiguous()
            draws = [_unrotated(small, spec, draw) for draw in range(DRAWS)]
            row["draw"] = float(relative_error(small, draws[0]))
            row["bias"] = float(relative_error(small, torch.stack(draws).mean(dim=0)))
        row["heavy"] = float(relative_error(heavy, _cast(heavy, spec, draw=0)).square())
        row["rotated"] = float(relative_error(turned, _cast(turned, spec, draw=0)).square())
        rows.append(row)
    return {"rows": rows, "shape": list(SHAPE), "draws": DRAWS, "seed": seed}


def table(found: dict[str, Any]) -> Any:
    """The rows as a rich table, errors times 1000."""
    from rich.table import Table

    shown = Table(title="what casts lose: mean squared errors x 1000")
    for column in (
        "cast",
        "N(0, 1)",
        "cosine",
        "1 draw",
        f"{found['draws']} draws",
        "t(3)",
        "rotated",
    ):
        left = column == "cast"
        shown.add_column(column, justify="left" if left else "right", no_wrap=left)
    for row in found["rows"]:
        draws = [f"{row[key]:.4f}" if key in row else "" for key in ("draw", "bias")]
        shown.add_row(
            _short(row["spec"]), f"{1000 * row['mse']:.3g}", f"{row['cosine']:.4f}", *draws,
            f"{1000 * row['heavy']:.3g}", f"{1000 * row['rotated']:.3g}",
        )  # fmt: skip
    return shown


def _cast(x: Tensor, spec: QuantSpec, *, draw: int) -> Tensor:
    noise = Noise(derive_key(7, draw)) if spec.stochastic else None
    values, alpha = emulate(x, spec, noise=noise, group=ROTATION)
    return values * alpha


def _unrotated(x: Tensor, spec: QuantSpec, draw: int) -> Tensor:
    """One draw of the cast; with a rotation of its own, undone, where the estimator needs one."""
    if not spec.rounding_row.scales:
        return _cast(x, spec, draw=draw)
    signs = _signs(draw)
    y = _cast(rotate(x, size=ROTATION, signs=signs, round_bf16=False), spec, draw=draw)
    back = rotate(y, size=ROTATION, round_bf16=False)
    return (back.view(x.shape[0], -1, ROTATION) * signs).view(x.shape)


def _signs(draw: int) -> Tensor:
    return torch.tensor(random_signs(derive_key(11, draw), ROTATION), dtype=torch.float32)


def _short(name: str) -> str:
    """A cast's name without the words that most have."""
    return " ".join(w for w in name.split() if w not in ("1d", "nearest", "default", "tensor"))


def _name(spec: QuantSpec) -> str:
    words = [spec.format, spec.block, spec.rounding, spec.scale]
    return " ".join(words + ([f"ties {spec.ties}"] if spec.ties != "even" else []))
