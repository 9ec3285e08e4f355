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
    # shards that end inside a block or a rotation, so that padding would change numbers
    (
        "precision=mxfp4_h16 model.ffn_hidden_size=608 parallel.tensor=2",
        2,
        "precision.dgrad.dy.block",
        r"304 features of mlp.linear_fc1, which blocks of 32 .*parallel\.tensor",
    ),
    (
        "precision=mxfp4_rht_sr model.ffn_hidden_size=640 parallel.tensor=4 "
        "model.num_query_groups=4",
        4,
        "precision.dgrad.rotation.size",
        r"160 features of mlp.linear_fc1, which blocks of 64 ",
    ),
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
def test_what_a_plan_keeps_in_bf16_may_be_split_anywhere(activation: str) -> None:
    """A rank's 300 rows of fc1 are no whole number of MX blocks; kept in BF16 they need not be."""
    sizes = ["precision=mxfp4_h16", "model.ffn_hidden_size=600", f"model.activation={activation}"]
    sizes += ["parallel.tensor=2"]
    with pytest.raises(UserError, match=r"300 features of mlp\.linear_fc1"):
        check_layout(compose(sizes), 2)
    kept = compose([*sizes, "precision.keep.modules=['*.mlp.*']"])
    assert check_layout(kept, 2).data == 1


def test_one_rank_pads_what_blocks_do_not_divide() -> None:
    sizes = ["model.hidden_size=264", "model.ffn_hidden_size=600", "model.seq_length=40"]
    for recipe in ("nvfp4", "mxfp4_h16", "mxfp4_rht_sr", "fp8_block"):
        config = compose([f"precision={recipe}", *sizes, "train.micro_batch=1"])
        assert check_layout(config, 1).data == 1
