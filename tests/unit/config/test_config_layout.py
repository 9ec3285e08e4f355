"""``check_layout``: ranks, sizes and blocks that do not fit are refused before a group exists."""

from __future__ import annotations

import re

import pytest

from fp4pretrain.config import compose
from fp4pretrain.errors import UserError
from fp4pretrain.model.layout import Layout, check_layout

SIZES = ["model=tiny", "train.micro_batch=8", "train.global_batch=16"]

FITS = [
    ("", 1, Layout(data=1, microbatches=2, chunks=1)),
    ("", 2, Layout(data=2, microbatches=1, chunks=1)),
    ("parallel.tensor=2", 2, Layout(data=1, microbatches=2, chunks=1)),
    ("parallel.tensor=2 parallel.sequence=true", 4, Layout(data=2, microbatches=1, chunks=1)),
    ("parallel.pipeline=4", 4, Layout(data=1, microbatches=2, chunks=1)),
    ("parallel.pipeline=2 parallel.virtual_pipeline=2", 2, Layout(1, 2, 2)),
]

# Overrides, ranks -> the key of the line and a pattern of the rest.
REFUSED = [
    ("parallel.tensor=2", 3, "parallel.tensor x parallel.pipeline", r"2 x 1 = 2 .* 3 .*torchrun"),
    ("parallel.tensor=2", 1, "parallel.tensor x parallel.pipeline", r"start a multiple of 2"),
    ("parallel.context=2", 2, "parallel.context", r"not supported yet; use 1"),
    ("parallel.sequence=true", 1, "parallel.sequence", r"parallel\.tensor to 2"),
    (
        "parallel.tensor=4",
        4,
        "parallel.tensor",
        r"4 does not divide model\.num_query_groups=2; change",
    ),
    (
        "parallel.tensor=2 parallel.sequence=true model.seq_length=255",
        2,
        "parallel.sequence",
        r"does not divide model\.seq_length=255; change",
    ),
    ("parallel.pipeline=8", 8, "parallel.pipeline", r"8 stages .* model\.num_layers=4; use fewer"),
    ("parallel.pipeline=3", 3, "parallel.pipeline", r"do not divide model\.num_layers=4; change"),
    ("parallel.virtual_pipeline=2", 1, "parallel.virtual_pipeline", r"parallel\.pipeline of 2"),
    ("", 4, "train.global_batch", r"16 .* 8 x 4; change"),
    (
        "parallel.pipeline=2 parallel.virtual_pipeline=2 train.global_batch=24",
        2,
        "train.global_batch",
        r"microbatches \(3\) in multiples of parallel\.pipeline=2; change",
    ),
    # blocks and rotations against the dimension that one rank holds
    (
        "model.hidden_size=264",
        1,
        "precision.fprop.x.block",
        r"blocks of 16 .*linear_qkv's 264 input features on a rank; change",
    ),
    (
        "precision=mxfp4_h16 model.ffn_hidden_size=608 parallel.tensor=2",
        2,
        "precision.fprop.x.block",
        r"blocks of 32 .*linear_fc2's 304 input features on a rank",
    ),
    (
        "precision=mxfp4_rht_sr model.ffn_hidden_size=608",
        1,
        "precision.dgrad.rotation.size",
        r"64 does not divide .*608 output features .*smaller size",
    ),
    (
        "precision=mxfp4_rht_sr train.micro_batch=1 model.seq_length=96",
        1,
        "precision.wgrad.rotation.size",
        r"64 does not divide .*96 tokens on a rank; use a smaller size",
    ),
    (
        "precision=nvfp4 train.micro_batch=1 model.seq_length=40",
        1,
        "precision.wgrad.dy.block",
        r"blocks of 16 .*40 tokens on a rank; change .*train\.micro_batch",
    ),
    ("precision=fp8_block model.hidden_size=192", 1, "precision.fprop.x.block", r"blocks of 128 "),
]


def _config(overrides: str) -> list[str]:
    return [*SIZES, *overrides.split()]


@pytest.mark.parametrize(("overrides", "ranks", "layout"), FITS)
def test_a_layout_that_fits_is_counted(overrides: str, ranks: int, layout: Layout) -> None:
    assert check_layout(compose(_config(overrides)), ranks) == layout


@pytest.mark.parametrize(("overrides", "ranks", "key", "rest"), REFUSED)
def test_a_layout_that_does_not_fit_is_one_line(
    overrides: str, ranks: int, key: str, rest: str
) -> None:
    config = compose(_config(overrides))
    with pytest.raises(UserError) as caught:
        check_layout(config, ranks)
    line = str(caught.value)
    assert line.startswith(f"{key}: ")
    assert re.search(rest, line)
    assert line.isprintable()


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_what_a_plan_keeps_in_bf16_needs_no_blocks(activation: str) -> None:
    """fc2's 600 input features are no whole number of MX blocks; kept in BF16 they need not be."""
    sizes = ["precision=mxfp4_h16", "model.ffn_hidden_size=600", f"model.activation={activation}"]
    with pytest.raises(UserError, match=r"linear_fc.*00"):
        check_layout(compose(sizes), 1)
    kept = compose([*sizes, "precision.keep.modules=['*.mlp.*']"])
    assert check_layout(kept, 1).data == 1
