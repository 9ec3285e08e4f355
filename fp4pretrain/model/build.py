"""The GPT: megatron-core's GPTModel on our layer spec, with every linear bound to the plan."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.activations import squared_relu
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig

from fp4pretrain.config import RunConfig, plan_of
from fp4pretrain.model.engine import ENGINE, engine_fields, engine_spec
from fp4pretrain.model.init import initialize
from fp4pretrain.nn.clock import Clock
from fp4pretrain.nn.embedding import fuse_embeddings
from fp4pretrain.nn.fused import fuse_layers
from fp4pretrain.nn.linear import Binding, Bound, ColumnParallelQuantLinear
from fp4pretrain.nn.loss import fused_cross_entropy
from fp4pretrain.nn.spec import block_spec
from fp4pretrain.ops import Backend, Site, SiteState, sites_of
from fp4pretrain.ops.choice import without_triton
from fp4pretrain.ops.keys import place_of
from fp4pretrain.precision import Plan, Progress, Recipe
from fp4pretrain.precision.rules import HEAD, LINEARS, QKV, short_name

# The vocabulary is padded to a multiple of this and of the tensor-parallel ranks.
_VOCAB_MULTIPLE = 128


class GPT(GPTModel):
    """GPTModel whose head is a linear of ours too.

    It runs in BF16 unless a rule says otherwise, and like the others it adds its weight gradient to
    the FP32 main gradient (a BF16 sum there diverged at 8T tokens: arXiv:2606.15007).

    ``z_loss`` times log(Z)^2, Z the denominator of the output softmax, joins what is minimized; the
    losses returned are the cross entropy alone, so that runs with and without it compare.

    ``fused``: the cross entropy copies no logits (`fp4pretrain.nn.loss`).

    ``given_positions``: rotary embeddings are those of the positions that a call gives (megatron-core
    takes 0, 1, 2, ... whatever it is given), unless keys and values are kept.
    """

    def __init__(
        self,
        *args: Any,
        z_loss: float = 0.0,
        given_positions: bool = False,
        fused: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.z_loss = z_loss
        self.fused = fused
        self._positions_bs: torch.Tensor | None = None
        self._known_bs: torch.Tensor | None = None
        self.given_positions = given_positions and self.position_embedding_type == "rope"
        if self.given_positions:
            self.rotary_pos_emb.register_forward_hook(self._place)
        if self.post_process:
            self.output_layer.__class__ = ColumnParallelQuantLinear

    def forward(
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        *args: Any,
        known_bs: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """megatron-core's signature; with ``given_positions`` every pipeline stage has to be
        given the positions [b, s]. ``known_bs``: the gradient that the losses are going to get, where
        the caller knows it (`fp4pretrain.nn.loss`)."""
        self._known_bs = known_bs
        keeps = kwargs.get("inference_context") is not None
        self._positions_bs = position_ids if self.given_positions and not keeps else None
        return super().forward(input_ids, position_ids, *args, **kwargs)

    def _place(self, module: Any, inputs: Any, angles: torch.Tensor) -> torch.Tensor:
        """Rotary angles [s, 1, 1, d] of positions 0, 1, 2, ... -> those given, [s, b, 1, d]."""
        if self._positions_bs is None:
            return angles
        return angles[:, 0, 0][self._positions_bs].transpose(0, 1).unsqueeze(2)

    def compute_language_model_loss(
        self, labels: torch.Tensor, logits: torch.Tensor
    ) -> torch.Tensor:
        """Cross entropy [b, s] of this rank's logits [s, b, vocabulary / ranks] for labels [b, s]."""
        if not (self.z_loss and self.training):
            if self.fused:
                group = self.pg_collection.tp
                return fused_cross_entropy(logits, labels, group, known_bs=self._known_bs)
            return super().compute_language_model_loss(labels, logits)
        # before the cross entropy, which works inside FP32 logits
        penalty_bs = (self.z_loss * log_denominator(logits) ** 2).transpose(0, 1)
        loss_bs = super().compute_language_model_loss(labels, logits)
        return loss_bs + (penalty_bs - penalty_bs.detach())


def log_denominator(logits: torch.Tensor) -> torch.Tensor:
    """log sum exp over the whole vocabulary, [s, b] FP32, of logits [s, b, vocabulary / ranks]."""
    logits = logits.float()
    largest = logits.detach().amax(dim=-1)
    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() > 1:
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    sums = torch.exp(logits - largest.unsqueeze(-1)).sum(dim=-1)
    return torch.log(reduce_from_tensor_model_parallel_region(sums)) + largest


@dataclass
class PlanBinding:
    """All quantized linears of this rank's chunks, the plan they follow, what their casts leave behind.

    ``linears``: (global layer or None for the head, name in the plan, what follows its recipe): a linear, or
    a part of one where the plan divides it.
    ``followed``: every recipe that a linear was given for a step, by (global layer or None, name).
    ``switches``: how often the plan has switched any linear of the whole model, the same on every rank.
    """

    plan: Plan
    linears: list[tuple[int | None, str, Bound]]
    sites: SiteState
    progress: Progress = field(default_factory=Progress)
    followed: dict[tuple[int | None, str], set[Recipe]] = field(default_factory=dict)
    switches: int = 0

    def recipes(self) -> list[Recipe]:
        """The recipe of each linear now, in the order of ``linears``."""
        return [linear.bound.recipe for _, _, linear in self.linears]

    def set_recipes(self, recipes: Sequence[Recipe]) -> None:
        """Give each linear the recipe at its place."""
        for (_, _, linear), recipe in zip(self.linears, recipes, strict=True):
            linear.bound.recipe = recipe

    def apply(self, progress: Progress) -> bool:
        """Give every linear its recipe for the next step; True if any of the model has another now."""
        switched = self.plan.switches(self.progress, progress)
        self.switches += switched
        self.progress = progress
        recipes = [self.plan.at(layer, name, progress) for layer, name, _ in self.linears]
        self.set_recipes(recipes)
        for (layer, name, _), recipe in zip(self.linears, recipes, strict=True):
            self.followed.setdefault((layer, name), set()).add(recipe)
        return switched


def padded_vocab(vocab_size: int, tensor: int) -> int:
    """``vocab_size`` rounded up so that all layouts of 1, 2, 4, ... 128 ranks have the same matrix."""
    multiple = math.lcm(_VOCAB_MULTIPLE, tensor)
    return -(-vocab_size // multiple) * multiple


def _squared_relu(x: torch.Tensor) -> torch.Tensor:
    """relu(x)^2. megatron-core compiles its own: on a CPU half a minute, and it needs a compiler."""
    return squared_relu(x) if x.is_cuda else F.relu(x).square()


def model_config(config: RunConfig) -> TransformerConfig:
    """megatron-core's TransformerConfig of a run. No fusions of its own: they need apex or TE."""
    m, p = config.model, config.parallel
    dtype = torch.bfloat16 if config.optim.params_dtype == "bf16" else torch.float32
    activation = {"swiglu": F.silu, "gelu": F.gelu, "squared_relu": _squared_relu}[m.activation]
    recompute: dict[str, Any] = {}
    if p.recompute == "full":
        recompute = {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    elif p.recompute == "selective":
        recompute = {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return TransformerConfig(
        num_layers=m.num_layers,
        hidden_size=m.hidden_size,
        ffn_hidden_size=m.ffn_hidden_size,
        num_attention_heads=m.num_attention_heads,
        num_query_groups=m.num_query_groups or m.num_attention_heads,
        kv_channels=m.kv_channels,
        activation_func=activation,
        gated_linear_unit=m.activation == "swiglu",
        normalization={"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}[m.normalization],
        layernorm_epsilon=m.norm_epsilon,
        add_bias_linear=m.bias,
        init_method_std=m.init_std,
        qk_layernorm=m.qk_norm,
        attention_dropout=m.attention_dropout,
        hidden_dropout=m.hidden_dropout,
        tensor_model_parallel_size=p.tensor,
        pipeline_model_parallel_size=p.pipeline,
        virtual_pipeline_model_parallel_size=p.virtual_pipeline,
        sequence_parallel=p.sequence,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        attention_softmax_in_fp32=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
        # Interleaved stages exchange both ways with the same neighbour when there are two of them;
        # only megatron-core's unbatched sends, on two groups, keep those messages apart.
        overlap_p2p_comm=p.virtual_pipeline is not None,
        batch_p2p_comm=p.virtual_pipeline is None,
        # a wait for the whole device after each exchange, for PyTorch of years ago; none may be captured
        batch_p2p_sync=False,
        # gloo reads a sent tensor until the send is done; NCCL's streams keep the order.
        deallocate_pipeline_outputs=dist.get_backend() == "nccl",
        **recompute,
        **(engine_fields(plan_of(config)) if m.implementation == ENGINE else {}),
    )


def build_model(
    config: RunConfig,
    plan: Plan,
    *,
    backend: Backend,
    clock: Clock,
    transformer: TransformerConfig,
) -> tuple[list[GPT], PlanBinding]:
    """This rank's model chunks (several with an interleaved pipeline), initialized and bound."""
    chunks_here = config.parallel.virtual_pipeline or 1
    chunks: list[GPT] = []
    linears: list[tuple[int | None, str, Bound]] = []
    sites = SiteState(remembering_sites(plan), torch.device(torch.cuda.current_device()))
    global_amax = config.precision.amax == "tensor_parallel"
    for index in range(chunks_here):
        stage = index if chunks_here > 1 else None
        chunk = _build_chunk(config, transformer, stage)
        initialize(
            chunk,
            seed=config.seed,
            std=config.model.init_std,
            num_layers=config.model.num_layers,
        )
        packed = config.train.packed_weights
        bind = partial(
            Binding, backend, clock, global_amax=global_amax, sites=sites, packed_weights=packed
        )
        linears += _bind(chunk, bind, plan, blocks=config.model.implementation != ENGINE)
        chunks.append(chunk)
    binding = PlanBinding(plan, linears, sites)
    binding.apply(Progress())
    binding.followed.clear()  # no step was taken by it: a run may go on elsewhere
    return chunks, binding


def fuses(config: RunConfig) -> bool:
    """Whether elementwise work runs by kernels of ours: on NVIDIA GPUs with Triton, unless told not to."""
    on_gpu = torch.device(torch.cuda.current_device()).type == "cuda"
    return config.train.fusion == "auto" and on_gpu and without_triton() is None


def _build_chunk(config: RunConfig, transformer: TransformerConfig, stage: int | None) -> GPT:
    m = config.model
    fused = fuses(config)
    if m.implementation == ENGINE:
        spec = engine_spec(transformer, stage)
    else:
        spec = block_spec(transformer, stage, softcap=m.attention_softcap, fused=fused)
    chunk = GPT(
        config=transformer,
        transformer_layer_spec=spec,
        vocab_size=padded_vocab(m.vocab_size, config.parallel.tensor),
        max_sequence_length=m.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        share_embeddings_and_output_weights=m.tie_embeddings,
        position_embedding_type={"rope": "rope", "learned": "learned_absolute"}[m.position],
        rotary_base=m.rotary_base,
        vp_stage=stage,
        z_loss=m.z_loss,
        given_positions=config.data.reset_positions,
        fused=fused,
    )
    if fused and m.implementation != ENGINE:
        fuse_layers(chunk.decoder, m.activation)
        if chunk.pre_process:
            fuse_embeddings(chunk.embedding)
    return chunk.to(torch.cuda.current_device())


def _bind(
    chunk: GPT, bind: Callable[..., Binding], plan: Plan, *, blocks: bool
) -> list[tuple[int | None, str, Bound]]:
    """Bind every linear of a chunk, of its ``blocks`` too where they are ours; returns them as in
    ``PlanBinding.linears``."""
    found: list[tuple[int | None, str, Bound]] = []

    def binding(layer: int | None, name: str) -> Binding:
        number, index = place_of(layer, name)
        return bind(layer=number, linear=index)

    for block in chunk.decoder.layers if blocks else ():
        layer = block.layer_number - 1
        for name in LINEARS:
            linear = block.get_submodule(name)
            parts = plan.parts(layer)
            if name != QKV or parts == (QKV,):
                linear.bind(binding(layer, name))
                found.append((layer, name, linear))
                continue
            rows = [
                (_part_rows(part, block.self_attention), binding(layer, part)) for part in parts
            ]
            bound = linear.divide(rows)
            found += [(layer, part, one) for part, one in zip(parts, bound, strict=True)]
    if chunk.post_process:
        chunk.output_layer.bind(binding(None, HEAD))
        found.append((None, HEAD, chunk.output_layer))
    return found


def _part_rows(part: str, attention: Any) -> torch.Tensor:
    """Which rows of a rank's projection matrix are those of a part: int64, in their order.

    megatron-core lays the matrix out by query groups: the queries of a group, its key, its value.
    """
    groups, head_size = (
        attention.num_query_groups_per_partition,
        attention.hidden_size_per_attention_head,
    )
    queries = attention.num_attention_heads_per_partition // groups * head_size
    letters = "q" * queries + "k" * head_size + "v" * head_size
    mine = [row for row, letter in enumerate(letters * groups) if letter in short_name(part)]
    return torch.tensor(mine, device=attention.linear_qkv.weight.device)


def remembering_sites(plan: Plan) -> dict[Site, int]:
    """The sites of the whole model whose amaxes outlive a step, and for how many steps."""
    return sites_of({place_of(*one): plan.recipes_of(*one) for one in plan.linears()})
