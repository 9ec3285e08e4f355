"""Does this run fit these ranks? Everything that can be refused before a process group exists."""

from __future__ import annotations

from dataclasses import dataclass

from fp4pretrain.config import RunConfig, plan_of
from fp4pretrain.errors import UserError
from fp4pretrain.precision.rules import LINEARS, QKV, QKV_PARTS, qkv_rows


@dataclass(frozen=True)
class Layout:
    """Sizes that follow from the config and the number of ranks."""

    data: int
    microbatches: int
    chunks: int  # model chunks on a pipeline rank (interleaved schedule), else 1


def check_layout(config: RunConfig, world_size: int) -> Layout:
    """The layout of ``config`` on ``world_size`` ranks.

    Raises UserError naming the key: ranks that do not factor, sizes that do not divide, fewer
    layers than stages, batches that do not split, blocks that do not fit a rank's share.
    """
    p, t = config.parallel, config.train
    if p.context != 1:
        raise UserError("parallel.context: context parallelism is not supported yet; use 1")
    model_ranks = p.tensor * p.pipeline
    if world_size % model_ranks:
        raise UserError(
            f"parallel.tensor x parallel.pipeline: {p.tensor} x {p.pipeline} = {model_ranks} does "
            f"not divide the {world_size} rank(s) started; start a multiple of {model_ranks} "
            "(torchrun --nproc-per-node) or change the layout"
        )
    if p.sequence and p.tensor == 1:
        raise UserError(
            "parallel.sequence: sequence parallelism splits over the tensor-parallel ranks; set "
            "parallel.tensor to 2 or more, or parallel.sequence=false"
        )
    _check_tensor(config)
    chunks = _check_pipeline(config)
    data = world_size // model_ranks
    if t.global_batch % (t.micro_batch * data):
        raise UserError(
            f"train.global_batch: {t.global_batch} is no multiple of train.micro_batch x data "
            f"parallel ranks = {t.micro_batch} x {data}; change one"
        )
    microbatches = t.global_batch // (t.micro_batch * data)
    if chunks > 1 and microbatches % p.pipeline:
        raise UserError(
            f"train.global_batch: the interleaved schedule needs microbatches ({microbatches}) in "
            f"multiples of parallel.pipeline={p.pipeline}; change train.global_batch or micro_batch"
        )
    _check_blocks(config)
    return Layout(data=data, microbatches=microbatches, chunks=chunks)


def _check_tensor(config: RunConfig) -> None:
    m, tensor = config.model, config.parallel.tensor
    groups = m.num_query_groups or m.num_attention_heads
    for key, size in (
        ("model.num_attention_heads", m.num_attention_heads),
        ("model.num_query_groups", groups),
        ("model.ffn_hidden_size", m.ffn_hidden_size),
    ):
        if size % tensor:
            raise UserError(
                f"parallel.tensor: {tensor} does not divide {key}={size}; change one of them"
            )
    if config.parallel.sequence and m.seq_length % tensor:
        raise UserError(
            f"parallel.sequence: parallel.tensor={tensor} does not divide model.seq_length="
            f"{m.seq_length}; change one of them"
        )


def _check_pipeline(config: RunConfig) -> int:
    p, layers = config.parallel, config.model.num_layers
    stages = p.pipeline * (p.virtual_pipeline or 1)
    if p.virtual_pipeline is not None and (p.virtual_pipeline < 1 or p.pipeline == 1):
        raise UserError(
            f"parallel.virtual_pipeline: {p.virtual_pipeline} chunks need parallel.pipeline of 2 "
            "or more; use null without a pipeline"
        )
    if layers < stages:
        raise UserError(
            f"parallel.pipeline: {stages} stages are more than model.num_layers={layers}; use fewer"
        )
    if layers % stages:
        raise UserError(
            f"parallel.pipeline: {stages} stages do not divide model.num_layers={layers}; change one"
        )
    return p.virtual_pipeline or 1


def _check_blocks(config: RunConfig) -> None:
    """Blocks and rotations against the shards that tensor parallelism makes.

    One rank pads what blocks do not divide. Several must not: their shards' padding would stand where
    one rank has elements.
    """
    m, tensor = config.model, config.parallel.tensor
    plan = plan_of(config)
    if tensor == 1:
        return
    heads, groups = m.num_attention_heads, m.num_query_groups or m.num_attention_heads
    head_size = m.kv_channels or m.hidden_size // heads
    up = m.ffn_hidden_size // tensor
    for name in (QKV, *QKV_PARTS):
        rows = qkv_rows(name, heads=heads, groups=groups, head_size=head_size)
        plan.check_shards(name, n=(rows // tensor,), k=None)
    plan.check_shards(LINEARS[1], n=(), k=heads * head_size // tensor)
    # the gate's and the up projection's halves are blocks apart in the whole matrix: each is a part
    plan.check_shards(LINEARS[2], n=(up,), k=None)
    plan.check_shards(LINEARS[3], n=(), k=up)
