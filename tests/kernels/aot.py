"""Compile the kernels for GPUs that are not here: ``compile_kernel(...)`` returns the assembly."""

from __future__ import annotations

from typing import Any

import triton
from fp4_kernels import activation, amax, block_gemm, cross_entropy, join, native, unpack
from fp4_kernels.adam import adam_kernel
from fp4_kernels.bias import bias_kernel
from fp4_kernels.column_sums import column_sums_kernel
from fp4_kernels.embedding import embedding_backward_kernel
from fp4_kernels.norm_kernel import norm_backward_kernel, norm_kernel
from fp4_kernels.quantize_kernel import quantize_kernel
from fp4_kernels.rope import rope_kernel
from fp4_kernels.spec import Copy, Noise
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TARGETS = {
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}
NOISE = Noise(1)
SIGNS = (1, -1) * 8
SR: dict[str, Any] = dict(rounding="stochastic", noise=NOISE)
PAIRS: dict[str, tuple[Copy | None, Copy | None]] = {
    "nvfp4": (
        Copy("nvfp4", **SR, output="exact"),
        Copy("nvfp4", rotation=16, signs=SIGNS),
    ),
    "mxfp4": (
        Copy("mxfp4", scale="even", output="e4m3"),
        Copy("mxfp4", scale="even", output="e4m3", rotation=16),
    ),
    "mxfp4 2d": (Copy("mxfp4", "2d", output="e4m3"), Copy("mxfp4", "2d", output="e4m3")),
    "fp8": (Copy("fp8_e4m3", "tensor"), Copy("fp8_e5m2", "tensor")),
    "fp8 blocks": (Copy("fp8_e4m3", "1d"), Copy("fp8_e4m3", "1d")),
    "nvfp4, row alone": (Copy("nvfp4", **SR, output="exact"), None),
    "nvfp4, column alone": (None, Copy("nvfp4", rotation=16, **SR)),
    "mxfp4, row alone": (Copy("mxfp4", scale="even", output="e4m3"), None),
    "mxfp4, column alone": (None, Copy("mxfp4", scale="even", output="e4m3", rotation=16)),
    "fp8, row alone": (Copy("fp8_e4m3", "row"), None),
}
# Integers that are multiples of sixteen in a real launch.
ALIGNED = ("stride", "R", "C", "K", "N", "D", *(f"{p}_{axis}" for p in "qkv" for axis in "sbh"))
_AMAX = dict(ROW=True, ROW_ROTATION=0, ROW_SIGNS=False, ROW_BF16=True)
_NOT_DRAWN = dict(row_draw=None, col_draw=None)
_AMAX |= _NOT_DRAWN | dict(COL=True, COL_ROTATION=16, COL_SIGNS=True, COL_BF16=True)


def compile_kernel(name: str, target: str) -> str:
    """Assembly (PTX or AMDGCN) of one kernel by the names of ``kernels()``."""
    fn, types, constants, options = kernels(target)[name]
    names = fn.arg_names
    aligned = [n for n, t in types.items() if t.startswith("*") or n in ALIGNED]
    source = ASTSource(
        fn=fn,
        signature={n: types.get(n, "constexpr") for n in names},
        constexprs={(names.index(n),): v for n, v in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in aligned},
    )
    compiled = triton.compile(source, target=TARGETS[target], options=options)
    return compiled.asm["ptx" if "ptx" in compiled.asm else "amdgcn"]


def kernels(target: str) -> dict[str, tuple[Any, dict[str, str], dict[str, Any], dict[str, Any]]]:
    """name: (kernel, argument types, constants, options) of everything this target can run."""
    options = dict(num_warps=4, enable_fp_fusion=False)
    tile = dict(TB=2, BN=128, EVEN=True)
    x = {"x_ptr": "*bf16", "stride": "i32", "R": "i32", "C": "i32"}
    signs = dict.fromkeys(("row_lo", "row_hi", "col_lo", "col_hi"), "i64")
    measured = _AMAX | tile | dict(STEPS=2, FAST=target != "gfx950")
    found: dict[str, Any] = {
        "amax": (
            amax.amax_kernel,
            x | {"work_ptr": "*i32", "out_ptr": "*fp32", "programs": "i32"} | signs,
            measured,
            options,
        ),
        "line_amax": (
            amax.line_amax_kernel,
            x | {"row_ptr": "*i32", "col_ptr": "*i32"} | signs,
            measured,
            options,
        ),
        "line_amax, rows alone": (
            amax.line_amax_kernel,
            x | {"row_ptr": "*i32", "col_ptr": "*i32"} | signs,
            measured | dict(ROW_ROTATION=16, COL=False, TB=2, BN=64, STEPS=1),
            options | dict(num_warps=1),
        ),
        "line_amax, both rotated": (
            amax.line_amax_kernel,
            x | {"row_ptr": "*i32", "col_ptr": "*i32"} | signs,
            measured | dict(ROW_ROTATION=16, COL_SIGNS=False, TB=2, BN=64, STEPS=1),
            options | dict(num_warps=1),
        ),
        "unpack": (
            unpack.unpack_kernel,
            {"codes_ptr": "*i32", "scales_ptr": "*u8", "out_ptr": "*bf16", "R": "i32", "C": "i32"},
            dict(BLOCK=16, TALL=1, E8M0=False, BM=16, BW=64),
            options,
        ),
        "unpack to e4m3": (
            unpack.unpack_e4m3_kernel,
            {"codes_ptr": "*i64", "scales_ptr": "*u8", "factors_ptr": "*fp32", "lost_ptr": "*i64"}
            | {"out_ptr": "*i32", "R": "i32", "C": "i32"},
            dict(TALL=1, BM=1, NB=256, FAST=target != "gfx950"),
            options,
        ),
    }
    drawn = {"row_draw": "*i64", "col_draw": "*i64"}
    fn, types, constants, _ = found["amax"]
    kept = {name: value for name, value in constants.items() if name not in drawn}
    found["amax, drawn"] = fn, types | drawn, kept, options
    found["quantize nvfp4, drawn"] = _quantize(
        "nvfp4", target != "gfx950", tile, options, draws=True
    )
    found |= _fused(options, fast=target != "gfx950")
    for pair in PAIRS:
        # blocks of 128 tokens need a tile that tall; tiles differ in config alone, so once is enough
        if (pair in ("mxfp4 2d", "fp8 blocks") or "alone" in pair) and target != "sm_90":
            continue
        shape = tile | dict(TB=8) if pair == "fp8 blocks" else tile
        found[f"quantize {pair}"] = _quantize(pair, target != "gfx950", shape, options)
    for name, tall in (("block gemm", 128), ("block gemm, wgrad", 1)):
        found[name] = _block_gemm(tall)
    if target != "sm_90":
        formats = ("mxfp4", "mxfp8") if target == "gfx950" else ("nvfp4", "mxfp4", "mxfp8")
        found |= {f"native {f}": _native(f) for f in formats}
    return found


def _quantize(pair: str, fast: bool, tile: dict, options: dict, *, draws: bool = False) -> tuple:
    types = {"x_ptr": "*bf16", "stride": "i32", "R": "i32", "C": "i32"}
    types |= _scalars("row") | _scalars("col")
    constants: dict[str, Any] = dict(tile, FAST=fast)
    for side, copy in zip(("row", "col"), PAIRS[pair], strict=True):
        constants["ROW" if side == "row" else "COL"] = copy.config() if copy else None
        if copy is None:
            absent = ("out", "scales", "amax", "alpha", "partner", "lost", "draw")
            constants |= {f"{side}_{name}": None for name in absent}
            continue
        packed = copy.output == "codes" and copy.format.endswith("fp4")
        scaled = copy.block_length or copy.amax == "row"
        blocks = "*u8" if packed else "*fp32" if scaled else None
        scales = {"e4m3": "*fp32", "exact": None}.get(copy.output, blocks)
        pointers = {
            "out": "*i32",
            "scales": scales,
            "amax": None if copy.amax == "none" else "*fp32",
            "alpha": "*fp32" if copy.amax == "tensor" else None,
            "partner": "*fp32" if copy.amax == "tensor" else None,
            "lost": "*i64" if copy.output == "e4m3" else None,
            "draw": "*i64" if draws else None,
        }
        for name, type_ in pointers.items():
            if type_ is None:
                constants[f"{side}_{name}"] = None
            else:
                types[f"{side}_{name}"] = type_
    return quantize_kernel, types, constants, options


LEAVE = (True, 16, True, True)  # both amaxes, with signs, rounded to bfloat16


def _fused(options: dict, *, fast: bool) -> dict[str, tuple]:
    """Norm, activations, splits and cross entropy, forward and backward, with the amaxes they leave."""
    names = ("x_ptr", "residual_ptr", "total_ptr", "weight_ptr", "bias_ptr", "out_ptr", "dy_ptr")
    names += ("dx_ptr", "dtotal_ptr", "linear_bias_ptr")
    bf16 = dict.fromkeys(names, "*bf16") | {"amax_ptr": "*i32"}
    row = {"rows": "i32", "N": "i32", "eps": "fp32"}
    shares = dict.fromkeys(("dw_ptr", "db_ptr", "dlinear_ptr"), "*fp32")
    statistics = {"statistics_ptr": "*fp32", "tiles": "i32", "lo": "i64", "hi": "i64"}
    whole = dict(CENTERED=True, EVEN=True, BLOCK=2048)
    places = [f"{part}_{axis}" for part in "qkv" for axis in "sbh"]
    rope = dict.fromkeys(("qkv_ptr", "q_ptr", "k_ptr", "v_ptr"), "*bf16") | {"angles_ptr": "*fp32"}
    share = {"shares_ptr": "*fp32"}
    rope |= dict.fromkeys(("T", "batch", "groups", "H", "angle_s", "angle_b", *places), "i32")
    left = {"R": "i32", "C": "i32", "lo": "i64", "hi": "i64"}
    token = {"x_ptr": "*bf16", "labels_ptr": "*i64", "V": "i32", "start": "i32"}
    kernels: dict[str, tuple[Any, dict[str, str], dict[str, Any]]] = {
        "norm": (norm_kernel, bf16 | row | statistics, whole | dict(LEAVE=None, R=1, FAST=fast)),
        "norm, turned": (
            norm_kernel, bf16 | row | statistics, whole | dict(LEAVE=LEAVE, R=1, FAST=fast),
        ),
        "norm backward": (
            norm_backward_kernel, bf16 | row | shares | statistics, whole | dict(U=2, R=1),
        ),
        "column sums": (
            column_sums_kernel,
            dict.fromkeys(("shares_ptr", "first_ptr", "second_ptr", "third_ptr"), "*fp32")
            | {"programs": "i32", "N": "i32"},
            dict(ADD=True, P=64, BN=16),
        ),
        **{
            f"{kind}{back}": (
                activation.activation_backward_kernel if back else activation.activation_kernel,
                bf16 | {n: left[n] for n in ("R", "lo", "hi")} | share,
                dict(C=1728, KIND=kind, LEAVE=LEAVE, GROUPS=2, BN=256, EVEN=True, FAST=fast),
            )
            for kind in activation.KINDS
            for back in ("", " backward")
        },
        **{
            f"{kind} of rows{back}": (
                activation.activation_row_backward_kernel if back else activation.activation_row_kernel,
                bf16 | row,
                dict(KIND=kind, BLOCK=1024, ROWS=4, FAST=fast),
            )
            for kind in activation.KINDS
            for back in ("", " backward")
        },
        "embedding backward": (
            embedding_backward_kernel,
            dict.fromkeys(("token_ptr", "place_ptr"), "*i64")
            | {"dy_ptr": "*bf16", "main_ptr": "*fp32", "T": "i32", "N": "i32"},
            dict(P=8, BN=512),
        ),
        "join": (
            join.join_kernel,
            dict.fromkeys(("dq_ptr", "dk_ptr", "dv_ptr", "out_ptr"), "*bf16")
            | left | share | {"amax_ptr": "*i32"} | dict.fromkeys(("T", "batch", "D", *places), "i32"),
            dict(HEADS=4, LEAVE=LEAVE, TB=4, BD=128, FAST=fast),
        ),
        "rope": (
            rope_kernel, rope | {"bias_ptr": "*bf16"},
            dict(HEADS=4, WRITTEN=6, BACKWARD=False, TOKENS=16, HALF=64),
        ),
        "rope backward": (
            rope_kernel, rope | share, dict(HEADS=4, WRITTEN=6, BACKWARD=True, TOKENS=16, HALF=64),
        ),
        "adam": (
            adam_kernel,
            dict.fromkeys(("rates_ptr", "scale_ptr", "blocked_ptr"), "*fp32")
            | dict.fromkeys(("beta1", "rest1", "beta2", "rest2", "eps"), "fp32")
            | {"table_ptr": "*i64", "programs_ptr": "*i32"},
            dict(FIELDS=6, ALIGNED=True, BLOCK=4096),
        ),
        "bias": (bias_kernel, bf16 | row, dict(R=8, BLOCK=512)),
        "token statistics": (
            cross_entropy.token_statistics_kernel,
            token | {"out_ptr": "*fp32", "T": "i32"},
            dict(BLOCK=4096, FAST=fast),
        ),
        "token statistics and gradients": (
            cross_entropy.token_statistics_kernel,
            token | {"out_ptr": "*fp32", "upstream_ptr": "*fp32", "T": "i32"},
            dict(BLOCK=4096, FAST=fast),
        ),
        "token rescale": (
            cross_entropy.token_rescale_kernel,
            token | dict.fromkeys(("known_ptr", "upstream_ptr"), "*fp32") | {"T": "i32"},
            dict(TOKENS=16, BLOCK=4096),
        ),
        "token gradients": (
            cross_entropy.token_gradients_kernel,
            token | dict.fromkeys(("log_total_ptr", "upstream_ptr"), "*fp32") | {"out_ptr": "*bf16"},
            dict(BLOCK=4096),
        ),
    }  # fmt: skip
    return {
        name: (fn, {n: types[n] for n in fn.arg_names if n in types}, constants, options)
        for name, (fn, types, constants) in kernels.items()
    }


def _scalars(side: str) -> dict[str, str]:
    """Types of the numbers that a draw gives a copy; a copy that is left out has them too."""
    places = ("row_offset", "row_part", "row_gap", "call_offset", "call_part", "call_gap")
    types = dict.fromkeys(("key", "signs_lo", "signs_hi"), "i64") | dict.fromkeys(places, "i32")
    return {f"{side}_{name}": type_ for name, type_ in types.items()}


def _block_gemm(tall: int) -> tuple:
    """x by a weight of 128x128 tiles to BF16, or dy by x, 1x128 both, into the FP32 main gradient."""
    types = dict(a_ptr="*fp8e4nv", a_scales_ptr="*fp32", b_ptr="*fp8e4nv", b_scales_ptr="*fp32")
    types |= {"out_ptr": "*bf16" if tall > 1 else "*fp32"}
    types |= dict.fromkeys(("M", "N", "K", "out_stride", "a_scale_step", "b_scale_step"), "i32")
    bm, bn, group, warps, stages = block_gemm.TILE
    constants = dict(a_scale_stride=1, B_TALL=tall, ACCUMULATE=tall == 1)
    constants |= dict(BM=bm, BN=bn, GROUP=group, BK=block_gemm.BLOCK)
    if tall == 1:
        constants["b_scale_stride"] = 1
    else:
        types["b_scale_stride"] = "i32"
    options = dict(num_warps=warps, num_stages=stages, enable_fp_fusion=True)
    return block_gemm.block_gemm_kernel, types, constants, options


def _native(format_: str) -> tuple:
    type_, pack, block = {
        "nvfp4": ("e2m1", 2, 16), "mxfp4": ("e2m1", 2, 32), "mxfp8": ("e4m3", 1, 32)
    }[format_]  # fmt: skip
    types = dict.fromkeys(("a_ptr", "a_scales_ptr", "b_ptr", "b_scales_ptr"), "*u8")
    types |= {"alpha_ptr": "*fp32", "out_ptr": "*fp32", "M": "i32", "N": "i32", "K": "i32"}
    bm, bn, bk, warps, stages = native.TILE
    constants: dict[str, Any] = dict(A_TYPE=type_, B_TYPE=type_, PACK=pack, ACCUMULATE=True)
    constants |= dict(E4M3=format_ == "nvfp4", BLOCK=block, A_TALL=1, B_TALL=1)
    constants |= dict(BM=bm, BN=bn, BK=bk * pack // 2)
    options = dict(num_warps=warps, num_stages=stages, enable_fp_fusion=False)
    return native.native_gemm_kernel, types, constants, options
