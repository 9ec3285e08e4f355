"""The distributed optimizer's shards as boxes of whole parameters.

Each data-parallel rank updates a run of consecutive elements of every parameter it has a share in.
Row by row, such a run is a few boxes: the end of one row, whole rows, the beginning of another. So
each rank stores what it has, and nothing is sent. (megatron-core gathers everything on every
data-parallel rank for its reshardable format: five copies of the state in host memory.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from fp4pretrain.train.checkpoint.files import Box


def shard_boxes(part: Any, models: dict[str, Any]) -> Iterator[Box]:
    """Copies of this rank's shards of a ``DistributedOptimizer``, in host memory.

    ``models`` describes the model's parameters, with factories (SwiGLU's halves) not yet applied.
    """
    leaves = leaf_of(models)
    for buffer in part.gbuf_ranges:
        for bucket in (bucket for buckets in buffer.values() for bucket in buckets):
            for parameter, ranges in bucket["param_map"].items():
                leaf = leaves[id(parameter)]
                # a factory's tensors are the parameter's parts, one after the other
                pieces = nested_values(leaf.build()) if hasattr(leaf, "build") else [leaf]
                first = ranges["param"].start
                states = part._get_main_param_and_optimizer_states(parameter)
                flats = {
                    k: v.detach().to("cpu", copy=True) for k, v in states.items() if k != "step"
                }
                yield from _parameter_boxes(list(pieces), flats, first=first)


def leaf_of(models: dict[str, Any]) -> dict[int, ShardedTensor | ShardedTensorFactory]:
    """By a parameter's id, what megatron-core says of its place in the whole model."""
    return {
        id(leaf.data): leaf
        for leaf in nested_values(models)
        if isinstance(leaf, ShardedTensor | ShardedTensorFactory)
    }


def _parameter_boxes(
    pieces: list[ShardedTensor], flats: dict[str, torch.Tensor], *, first: int
) -> Iterator[Box]:
    begin = 0
    for piece in pieces:
        end = begin + math.prod(piece.local_shape)
        # the last of a replica's numbers is the data-parallel rank: here each has its own elements
        if not any(piece.replica_id[:-1]):
            for name, flat in flats.items():
                low, high = max(begin, first), min(end, first + flat.numel())
                at = low - first
                for offset, shape in rectangles(piece.local_shape, low - begin, high - begin):
                    size = math.prod(shape)
                    yield _box(
                        piece, f"optimizer.state.{name}.", offset, flat[at : at + size].view(shape)
                    )
                    at += size
        begin = end


def _box(piece: ShardedTensor, prefix: str, offset: tuple[int, ...], data: torch.Tensor) -> Box:
    ahead = piece.prepend_axis_num
    start = [0] * ahead + list(offset)
    return Box(
        prefix + piece.key,
        tuple(piece.global_shape),
        tuple(a + b for a, b in zip(piece.global_offset, start, strict=True)),
        data.reshape((1,) * ahead + tuple(data.shape)),
    )


def rectangles(
    shape: tuple[int, ...], low: int, high: int
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Elements ``low`` to ``high`` of a tensor in row-major order, as (offset, shape) in that order."""
    if low >= high:
        return []
    if len(shape) == 1:
        return [((low,), (high - low,))]
    inner = math.prod(shape[1:])
    found = []
    while low < high:
        row, within = divmod(low, inner)
        rows = (high - low) // inner
        if within == 0 and rows:
            found.append(((row, *[0] * (len(shape) - 1)), (rows, *shape[1:])))
            low += rows * inner
        else:
            end = min(high, (row + 1) * inner)
            below = rectangles(tuple(shape[1:]), within, within + end - low)
            found += [((row, *offset), (1, *extent)) for offset, extent in below]
            low = end
    return found
