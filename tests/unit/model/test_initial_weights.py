"""Initial weights are a function of (seed, global name): no layout is another model."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fp4pretrain.model.build import padded_vocab
from fp4pretrain.model.init import initialize
from fp4pretrain.nn.linear import ColumnParallelQuantLinear, RowParallelQuantLinear

H, F, V, LAYERS = 32, 48, 128, 4


class Group:
    """Stands in for a tensor-parallel process group."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


def parameter(n: int, k: int, *, dim: int, ranks: int, stride: int = 1) -> torch.nn.Parameter:
    shape = [n, k]
    shape[dim] //= ranks
    made: Any = torch.nn.Parameter(torch.zeros(shape))
    made.tensor_model_parallel, made.partition_dim, made.partition_stride = True, dim, stride
    return made


class Linear(torch.nn.Module):
    def __init__(self, *args: int, **kwargs: int) -> None:
        super().__init__()
        self.weight = parameter(*args, **kwargs)
        self.bias = torch.nn.Parameter(torch.zeros(3))


def stage(
    first: int, last: int, *, rank: int = 0, ranks: int = 1, tied: bool = False
) -> torch.nn.Module:
    """The named parameters of one pipeline stage and tensor rank, as megatron-core names them."""
    model: Any = torch.nn.Module()
    model.pg_collection = SimpleNamespace(tp=Group(rank, ranks))
    model.share_embeddings_and_output_weights = tied
    model.decoder = torch.nn.Module()
    model.decoder.layers = torch.nn.ModuleList()
    for index in range(first, last):
        layer: Any = torch.nn.Module()
        layer.layer_number = index + 1
        layer.mlp = torch.nn.Module()
        layer.mlp.linear_fc1 = Linear(2 * F, H, dim=0, ranks=ranks, stride=2)
        layer.mlp.linear_fc2 = Linear(H, F, dim=1, ranks=ranks)
        layer.norm = torch.nn.LayerNorm(H)
        model.decoder.layers.append(layer)
    if first == 0:
        model.embedding = torch.nn.Module()
        model.embedding.word_embeddings = Linear(V, H, dim=0, ranks=ranks)
    if last == LAYERS:
        model.output_layer = Linear(V, H, dim=0, ranks=ranks)
    return model


def drawn(first: int, last: int, *, seed: int = 1, **layout: Any) -> dict[str, torch.Tensor]:
    """Parameters by their name in the stage."""
    model = stage(first, last, **layout)
    # a stand-in with a GPT's parameter names, not a GPT
    initialize(model, seed=seed, std=0.02, num_layers=LAYERS)  # type: ignore[arg-type]  # a stand-in
    return {name: p.detach() for name, p in model.named_parameters()}


def test_pipeline_stages_draw_the_layers_of_the_whole() -> None:
    whole = drawn(0, LAYERS)
    for first in (0, 2):
        for name, value in drawn(first, first + 2).items():
            parts = name.split(".")
            if "layers" in parts:
                parts[2] = str(int(parts[2]) + first)
            assert torch.equal(value, whole[".".join(parts)]), name


@pytest.mark.parametrize("ranks", [2, 4])
def test_tensor_ranks_hold_the_parts_of_the_whole_that_their_noise_is_placed_at(
    ranks: int,
) -> None:
    whole = drawn(0, LAYERS)
    for rank in range(ranks):
        found = drawn(0, LAYERS, rank=rank, ranks=ranks)
        placed = {
            "linear_fc1.weight": _column_rows(2 * F, 2, rank, ranks),
            "linear_fc2.weight": _row_cols(F, rank, ranks),
            "word_embeddings.weight": _column_rows(V, 1, rank, ranks),
            "output_layer.weight": _column_rows(V, 1, rank, ranks),
        }
        for suffix, index in placed.items():
            axis = 1 if "fc2" in suffix else 0
            for name in (n for n in whole if n.endswith(suffix)):
                assert torch.equal(found[name], whole[name].index_select(axis, index)), name


def _column_rows(size: int, stride: int, rank: int, ranks: int) -> torch.Tensor:
    """The global rows of a column-parallel shard, from the placement its noise uses."""
    linear: Any = SimpleNamespace(
        tp_group=Group(rank, ranks),
        output_size=size,
        output_size_per_partition=size // ranks,
        weight=SimpleNamespace(partition_stride=stride),
    )
    offset, part, gap = ColumnParallelQuantLinear._shard(linear).n
    row = torch.arange(size // ranks)
    return offset + row + (row // part * gap if part else 0)


def _row_cols(size: int, rank: int, ranks: int) -> torch.Tensor:
    linear: Any = SimpleNamespace(
        tp_group=Group(rank, ranks), input_size_per_partition=size // ranks
    )
    offset, part, _ = RowParallelQuantLinear._shard(linear).k
    assert part == 0
    return offset + torch.arange(size // ranks)


def test_a_head_tied_to_an_embedding_on_another_stage_is_that_embedding() -> None:
    first, last = drawn(0, 2, tied=True), drawn(2, LAYERS, tied=True)
    embedding = first["embedding.word_embeddings.weight"]
    assert torch.equal(last["output_layer.weight"], embedding)
    assert not torch.equal(drawn(2, LAYERS)["output_layer.weight"], embedding)


def test_scales_and_what_is_left_alone() -> None:
    found = drawn(0, LAYERS)
    for name, value in found.items():
        if value.dim() < 2:
            assert torch.equal(value, (torch.ones if "norm.weight" in name else torch.zeros)(
                value.shape
            ))  # fmt: skip
            continue
        std = 0.02 / math.sqrt(2 * LAYERS) if "fc2" in name else 0.02
        n = value.numel()
        # the standard error of a standard deviation is std / sqrt(2 n), of a mean std / sqrt(n)
        assert float(value.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * n))
        assert abs(float(value.mean())) < 5 * std / math.sqrt(n)


def test_every_matrix_and_every_seed_is_drawn_apart() -> None:
    matrices = [v for seed in (1, 2) for v in drawn(0, LAYERS, seed=seed).values() if v.dim() > 1]
    first = {float(v.flatten()[0]) for v in matrices}
    assert len(first) == len(matrices)
    again = drawn(0, LAYERS)
    assert all(torch.equal(v, again[n]) for n, v in drawn(0, LAYERS).items())


@pytest.mark.parametrize("vocab", [1, 128, 129, 257, 50257, 128256])
@pytest.mark.parametrize("tensor", [1, 2, 3, 4, 6, 8, 12, 16, 64])
def test_the_vocabulary_divides_and_powers_of_two_share_one_matrix(vocab: int, tensor: int) -> None:
    padded = padded_vocab(vocab, tensor)
    assert padded % tensor == 0
    assert vocab <= padded < vocab + math.lcm(128, tensor)
    if tensor & (tensor - 1) == 0:
        assert padded == padded_vocab(vocab, 1)
