"""Everything one run is made of, put together once: groups, plan, model, optimizer, data."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig

from fp4pretrain import fingerprint
from fp4pretrain.config import RunConfig, plan_of
from fp4pretrain.data import (
    DataSpec,
    EvaluationSampler,
    RunData,
    batches,
    build_datasets,
    evaluation_batches,
)
from fp4pretrain.errors import UserError
from fp4pretrain.model import build_model, model_config
from fp4pretrain.model.build import PlanBinding
from fp4pretrain.model.engine import ENGINE, engine_words
from fp4pretrain.model.layout import Layout
from fp4pretrain.nn.clock import Clock
from fp4pretrain.ops import Backend, choose
from fp4pretrain.parallel.agreement import agree
from fp4pretrain.parallel.groups import World, join, pick_device
from fp4pretrain.precision import Plan, Progress
from fp4pretrain.train.asked import KINDS, Asked
from fp4pretrain.train.gathering import gather
from fp4pretrain.train.optimizer import build_optimizer, build_schedule
from fp4pretrain.train.replay import Replays, why_not
from fp4pretrain.train.step import Begun
from fp4pretrain.train.weight_paths import WeightPaths

Batch = dict[str, torch.Tensor]
TRIGGERS = "triggers"  # what is remembered of them, in ``Trainer.memory``


@dataclass
class Trainer:
    """The state of a run.

    ``step`` counts finished steps, ``consumed_samples`` is the position in the data (sequences read
    or passed over by all ranks), ``skipped_samples`` how many of those were passed over.
    ``data`` has the training samples and the validation sets; ``fingerprint`` is what shapes the curve.
    ``paths`` follows weights while the plan looks for swinging ones; ``replays`` computes the steps.
    ``memory`` is what hooks remember across restarts: JSON values, stored with every checkpoint.
    ``begun``: the step that the device was given while the one before it was not read yet (`train_step`);
    ``asked``: what is asked of the run from outside, ``asked_for``: the largest number of it over all ranks,
    as of the last step that was read, and ``counted`` what the backends of all ranks counted since they
    started. A hook that sets ``stopped`` ends the loop early.
    """

    config: RunConfig
    world: World
    layout: Layout
    clock: Clock
    chunks: list[DistributedDataParallel]
    binding: PlanBinding
    paths: WeightPaths
    transformer: TransformerConfig
    optimizer: Any
    schedule: Any
    data: RunData
    fingerprint: dict[str, Any]
    backend: Backend
    backend_choice: str
    parameters: int
    replays: Replays
    asked: Asked
    counted: dict[str, int]
    asked_for: int = 0
    begun: Begun | None = None
    step: int = 0
    consumed_samples: int = 0
    skipped_samples: int = 0
    memory: dict[str, Any] = field(default_factory=dict)
    stopped: bool = False

    @property
    def tokens(self) -> int:
        """Tokens the model was trained on."""
        return (self.consumed_samples - self.skipped_samples) * self.config.model.seq_length

    @property
    def progress(self) -> Progress:
        """How far the run is, for the plan."""
        fired = self.memory.get(TRIGGERS, {}).get("fired", ())
        return Progress(self.step, self.config.train.steps, self.tokens, frozenset(fired))

    def settle(self) -> None:
        """Before weights or state are read or written between steps: every rank has whole weights after it.
        Collective. Raises RuntimeError where the device is a step ahead of ``step``."""
        if self.begun is not None:
            raise RuntimeError(
                f"step {self.step + 1} has begun, and state of step {self.step} is asked"
            )
        gather(self.chunks)

    def batches(self, consumed_samples: int) -> list[Iterator[Batch] | None]:
        """This rank's training microbatches from a position in the data on, for each of its model
        chunks; None for chunks that read none."""

        def iterator() -> Iterator[Batch]:
            return batches(
                self.data.train,
                consumed_samples=consumed_samples,
                micro_batch=self.config.train.micro_batch,
                dp_rank=self.world.data_rank,
                dp_size=self.world.data_size,
                rotate=self.config.train.sum_order,
                num_workers=self.config.data.workers,
            )

        return [iterator() if self._reads(chunk) else None for chunk in self.chunks]

    def _reads(self, chunk: Any) -> bool:
        """Whether a model chunk needs tokens (first stage) or labels (last stage), or, as all do where
        attention or positions heed them, the ends of documents."""
        gpt, d = unwrapped(chunk), self.config.data
        return gpt.pre_process or gpt.post_process or d.document_mask or d.reset_positions

    def evaluation_batches(
        self, name: str, sampler: EvaluationSampler
    ) -> list[Iterator[Batch] | None]:
        """This rank's microbatches of a validation set, for each of its model chunks."""
        dataset = self.data.valid[name]
        return [
            evaluation_batches(dataset, sampler) if self._reads(chunk) else None
            for chunk in self.chunks
        ]


def unwrapped(chunk: Any) -> Any:
    """The GPT inside DDP and the precision wrapper."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def join_run(config: RunConfig) -> World:
    """Form the groups of a checked config's layout, on its device, with its seed."""
    p, m = config.parallel, config.model
    device = pick_device(p.device)
    if device.type == "cuda":
        _fix_order(config.train.deterministic)
    return join(
        device=device,
        tensor=p.tensor,
        pipeline=p.pipeline,
        virtual_pipeline=p.virtual_pipeline,
        seed=config.seed,
        timeout_minutes=p.timeout_minutes,
        dropout=m.attention_dropout > 0 or m.hidden_dropout > 0,
    )


def _fix_order(deterministic: bool) -> None:
    """Have PyTorch's and cuBLAS's kernels add in a fixed order, or not. Call it before the first product."""
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    # Off, since it costs a pass over every new tensor. (mypy does not see properties of a module.)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def build_trainer(config: RunConfig, world: World, layout: Layout) -> Trainer:
    """Model, optimizer and data of a checked config on formed groups. Raises UserError for data."""
    data = _datasets(config, world)
    plan = plan_of(config)
    p = config.precision
    backend, choice = choose(
        p.backend,
        plan,
        world.device,
        mxfp4_emulation=p.mxfp4_emulation,
        group=dist.group.WORLD,
    )
    if config.model.implementation == ENGINE:
        choice = f"blocks of Transformer Engine's modules ({engine_words(plan)}); head: {choice}"
    clock = Clock(config.seed)
    transformer = model_config(config)
    gpts, binding = build_model(config, plan, backend=backend, clock=clock, transformer=transformer)
    parameters = _count_parameters(gpts)
    chunks = _wrap(config, world, transformer, gpts)
    optimizer = build_optimizer(config, chunks)
    return Trainer(
        config=config,
        world=world,
        layout=layout,
        clock=clock,
        chunks=chunks,
        binding=binding,
        paths=WeightPaths(binding.linears),
        transformer=transformer,
        optimizer=optimizer,
        schedule=build_schedule(config, optimizer),
        data=data,
        fingerprint=fingerprint.whole(config, plan, describe(data)),
        backend=backend,
        backend_choice=choice,
        parameters=parameters,
        replays=Replays(_graph_refused(config, plan, backend, world)),
        asked=Asked(KINDS, world.device),
        counted=dict.fromkeys(backend.counters(plan.recipes(), world.device), 0),
    )


def _graph_refused(config: RunConfig, plan: Plan, backend: Backend, world: World) -> str | None:
    """Why steps are not captured, None where they are. Raises UserError where they should be and cannot."""
    if config.train.graph == "never":
        return "train.graph=never"
    reason = why_not(config, plan, backend, device=world.device)
    if reason is not None and config.train.graph == "always":
        raise UserError(f"train.graph: {reason}; use train.graph=auto")
    return reason


def data_spec(config: RunConfig) -> DataSpec:
    """The data section as the data room's own spec."""
    d = config.data
    return DataSpec(
        path=d.path,
        tokenizer=d.tokenizer,
        split=d.split,
        valid=d.valid,
        valid_tokens=d.valid_tokens,
        seq_length=config.model.seq_length,
        seed=fingerprint.data_seed(config),
        cache_dir=d.cache_dir,
        mock=d.mock,
        vocab_size=config.model.vocab_size,
        document_mask=d.document_mask,
        reset_positions=d.reset_positions,
        eod_mask_loss=d.eod_mask_loss,
    )


def describe(data: RunData) -> dict[str, Any]:
    """What is recorded of a run's data: digests of its order and of its validation sets."""
    sets = {
        name: {"digest": found.digest, "tokens": found.tokens, "sequences": len(found)}
        for name, found in data.valid.items()
    }
    return {fingerprint.ORDER: data.digest, fingerprint.VALIDATION: sets}


def _datasets(config: RunConfig, world: World) -> RunData:
    return build_datasets(
        data_spec(config),
        samples=config.train.steps * config.train.global_batch,
        is_builder=world.is_main,
        agree=agree,
    )


def _count_parameters(gpts: Sequence[torch.nn.Module]) -> int:
    """Parameters of the whole model: shards summed over its ranks, whole tensors counted once."""
    tensor_rank = parallel_state.get_tensor_model_parallel_rank()
    count = 0
    for gpt in gpts:
        for parameter in gpt.parameters():
            if getattr(parameter, "shared", False):
                continue
            if getattr(parameter, "tensor_model_parallel", False) or tensor_rank == 0:
                count += parameter.numel()
    total = torch.tensor([count], dtype=torch.int64, device=torch.cuda.current_device())
    dist.all_reduce(total, group=parallel_state.get_model_parallel_group())
    return int(total.item())


def overlaps(config: RunConfig, world: World) -> bool:
    """Whether data-parallel communication runs beside computing; on CPUs gloo would take its cores."""
    return config.parallel.overlap and world.data_size > 1 and world.device.type == "cuda"


def _wrap(
    config: RunConfig, world: World, transformer: TransformerConfig, gpts: Sequence[torch.nn.Module]
) -> list[DistributedDataParallel]:
    """Precision wrapper and DDP with FP32 gradients, and the hooks that schedules call."""
    overlap = overlaps(config, world)
    sharded = config.parallel.distributed_optimizer
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap and sharded,
        use_distributed_optimizer=sharded,
    )
    chunks = []
    for index, gpt in enumerate(gpts):
        inner = Float16Module(transformer, gpt) if transformer.bf16 else gpt
        chunks.append(DistributedDataParallel(transformer, ddp, inner, disable_bucketing=index > 0))
    if overlap:
        no_sync = [chunk.no_sync for chunk in chunks]
        transformer.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    transformer.finalize_model_grads_func = finalize_model_grads
    return chunks
