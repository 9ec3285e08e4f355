"""Layouts of four and eight ranks, and a model that every one of them can shard.

On gloo: ``test_grid.py`` (``make chaos``). On GPUs: ``scripts/layouts``. Layouts of two ranks are in
``test_layouts.py``; here they stand for a machine with two GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """``data``: the degree of data parallelism, which is what tensor and pipeline leave of ``ranks``."""

    ranks: int
    overrides: tuple[str, ...] = ()
    data: int = 1

    @property
    def splits_sums(self) -> bool:
        """Whether tensor parallelism splits the sums of row-parallel linears."""
        return any(text.startswith("parallel.tensor=") for text in self.overrides)


def _layout(
    ranks: int, *, tensor: int = 1, pipeline: int = 1, virtual: int = 1, sequence: bool = False
) -> Layout:
    overrides = []
    if tensor > 1:
        overrides.append(f"parallel.tensor={tensor}")
    if sequence:
        overrides.append("parallel.sequence=true")
    if pipeline > 1:
        overrides.append(f"parallel.pipeline={pipeline}")
    if virtual > 1:
        overrides.append(f"parallel.virtual_pipeline={virtual}")
    return Layout(ranks, tuple(overrides), ranks // (tensor * pipeline))


ONE = "1 GPU"
LAYOUTS = {
    ONE: _layout(1),
    "DP 2": _layout(2),
    "TP 2": _layout(2, tensor=2),
    "TP 2 + SP": _layout(2, tensor=2, sequence=True),
    "PP 2 interleaved": _layout(2, pipeline=2, virtual=2),
    "TP 2 x PP 2": _layout(4, tensor=2, pipeline=2),
    "TP 4": _layout(4, tensor=4),
    "DP 4": _layout(4),
    "PP 4 interleaved": _layout(4, pipeline=4, virtual=2),
    "TP 2 x DP 2 + SP": _layout(4, tensor=2, sequence=True),
    "TP 4 + SP": _layout(4, tensor=4, sequence=True),
    "TP 2 x PP 2 x DP 2 + SP": _layout(8, tensor=2, pipeline=2, sequence=True),
    "TP 8": _layout(8, tensor=8),
    "DP 8": _layout(8),
}


def fitting(ranks: int) -> list[str]:
    """The layouts that ``ranks`` ranks can run; those of two where there are no four."""
    return [n for n, one in LAYOUTS.items() if min(ranks, 4) <= one.ranks <= ranks and n != ONE]


# Eight shards of an operand still have whole blocks of 32 and heads of their own, eight ranks a microbatch
# each, and four stages two chunks each.
MODEL = (
    "model.num_layers=8 model.hidden_size=128 model.num_attention_heads=8 model.num_query_groups=8 "
    "model.kv_channels=32 model.ffn_hidden_size=256 model.seq_length=64 train.micro_batch=2 "
    "train.global_batch=16 train.steps=10 data.valid_tokens=256 data.mock=true"
).split()
