"""The run config: every key a user can set, with its default and its check, in one place.

The dataclasses below are Hydra's schema. YAML files in ``configs/`` fill them in, command-line
overrides change them, and an unknown key or value fails here, while composing. ``RunConfig`` is
plain data; nothing below this module imports Hydra.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any, get_args, get_type_hints

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fp4pretrain.checks import check
from fp4pretrain.errors import UserError
from fp4pretrain.numerics import QuantSpec
from fp4pretrain.overrides import names_nothing, one_line, refuse_unknown
from fp4pretrain.precision import Dgrad, Fprop, Keep, Plan, Recipe, Rotation, Tail, Wgrad
from fp4pretrain.presets import config_dir


def _schema_of(frozen: Any) -> type:
    """The same dataclass unfrozen: Hydra treats frozen ones as read-only, so no override could land.

    Nested dataclasses are mirrored too and tuples become lists, the YAML spelling.
    """
    fields: list[tuple[str, Any, Any]] = []
    hints = get_type_hints(frozen)
    for f in dataclasses.fields(frozen):
        kind: Any = hints[f.name]
        if dataclasses.is_dataclass(kind):
            mirror = _schema_of(kind)
            fields.append((f.name, mirror, field(default_factory=mirror)))
        elif getattr(kind, "__origin__", None) is tuple:
            values = list(f.default) if f.default is not dataclasses.MISSING else []
            item = get_args(kind)[0]
            fields.append(
                (f.name, list.__class_getitem__(item), field(default_factory=values.copy))
            )
        else:
            fields.append((f.name, kind, field(default=f.default)))
    return dataclasses.make_dataclass(frozen.__name__ + "Config", fields)


@dataclass
class ModelConfig:
    """A dense GPT. Sizes are global (before tensor parallelism)."""

    num_layers: int = 4
    hidden_size: int = 256
    ffn_hidden_size: int = 768
    num_attention_heads: int = 4
    num_query_groups: int | None = None
    kv_channels: int | None = None
    seq_length: int = 256
    vocab_size: int = 257
    activation: str = "swiglu"
    normalization: str = "rmsnorm"
    norm_epsilon: float = 1e-5
    position: str = "rope"
    rotary_base: int = 10000
    tie_embeddings: bool = False
    bias: bool = False
    init_std: float = 0.02
    attention_dropout: float = 0.0
    hidden_dropout: float = 0.0


@dataclass
class DataConfig:
    """What to train on. ``path``: null for the running Python's standard library, a prefix of an
    indexed dataset, or ``{name: {prefix: ..., weight: ...}}`` for a blend."""

    path: Any = None
    tokenizer: str = "byte"
    split: str = "0.98,0.02,0"
    cache_dir: str | None = None
    mock: bool = False


@dataclass
class OptimConfig:
    """AdamW with FP32 masters; ``schedule`` wsd (warmup, stable, decay) or cosine.

    ``warmup`` and ``decay`` are fractions of the run's steps; ``params_dtype`` is what the GEMMs
    read (bf16, or fp32 to separate effects).
    """

    lr: float = 1e-3
    min_lr: float = 1e-5
    schedule: str = "wsd"
    warmup: float = 0.05
    decay: float = 0.2
    decay_shape: str = "linear"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0
    params_dtype: str = "bf16"


@dataclass
class ParallelConfig:
    """Layout of the ranks; data parallelism takes what is left of the world size.

    ``timeout_minutes``: how long a rank waits for the others before it fails (also while rank 0
    builds the index of a dataset).
    """

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int | None = None
    sequence: bool = False
    context: int = 1
    distributed_optimizer: bool = True
    overlap: bool = True
    recompute: str = "none"
    device: str = "auto"
    timeout_minutes: float = 10.0


@dataclass
class TrainConfig:
    """Lengths in optimizer steps; ``micro_batch`` and ``global_batch`` in sequences."""

    steps: int = 200
    micro_batch: int = 8
    global_batch: int = 16
    log_interval: int = 1
    eval_interval: int = 50
    eval_batches: int = 8
    eval_bf16: bool = True


@dataclass
class CheckpointConfig:
    """``interval`` in steps (0: only the end of the run).

    ``keep_last`` complete ones are kept, and those whose step ``keep_every`` divides (0: none).
    ``asynchronous``: files are written while training goes on, from a copy in host memory.
    ``allow_recipe_change``: a checkpoint of another ``precision`` may be resumed in this one.
    """

    interval: int = 0
    keep_last: int = 2
    keep_every: int = 0
    at_end: bool = True
    asynchronous: bool = True
    allow_recipe_change: bool = False


@dataclass
class SpikeConfig:
    """A loss spike: ``patience`` losses in a row above mean + ``threshold`` standard deviations.

    Mean and deviation follow about ``window`` steps; the first ``warmup`` losses are only learned.
    ``action``: ``none``, ``report`` (an event, nothing else) or ``rollback``.
    """

    action: str = "report"
    threshold: float = 7.0
    window: int = 100
    warmup: int = 200
    patience: int = 10


@dataclass
class GuardConfig:
    """What a run does about NaN and Inf, loss spikes and hangs.

    A step whose loss or gradients are not finite changes nothing. After ``max_skipped`` of them in a
    row (0: never) the run goes back to its last good checkpoint and passes over the data in between
    and ``skip_batches`` global batches more; one more than ``max_rollbacks`` times, it stops.
    ``hang_timeout`` (seconds without a finished step; 0: off): every rank writes its stacks, and with
    ``hang_action`` ``restart`` ends, for torchrun to start it again (``report``: goes on waiting).
    Below ``parallel.timeout_minutes``, at which the collectives themselves give up.
    """

    max_skipped: int = 5
    skip_batches: int = 0
    max_rollbacks: int = 5
    spike: SpikeConfig = field(default_factory=SpikeConfig)
    hang_timeout: float = 540.0
    hang_action: str = "restart"


@dataclass
class ProfileConfig:
    """torch's profiler records ``steps`` steps after step ``start`` (0 steps: it stays off)."""

    start: int = 10
    steps: int = 0


@dataclass
class WandbConfig:
    """``mode`` auto: $WANDB_MODE, or online where an API key is set and offline otherwise. ``project``
    null: $WANDB_PROJECT, or fp4pretrain. What is null or empty is what wandb's own variables say."""

    mode: str = "auto"
    project: str | None = None
    entity: str | None = None
    group: str | None = None
    name: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class LoggingConfig:
    wandb: WandbConfig = field(default_factory=WandbConfig)
    console: str = "auto"


RecipeFprop = _schema_of(Fprop)
RecipeDgrad = _schema_of(Dgrad)
RecipeWgrad = _schema_of(Wgrad)
KeepConfig = _schema_of(Keep)
TailConfig = _schema_of(Tail)


@dataclass
class PrecisionConfig:
    """A recipe, what it leaves out, and who computes it.

    ``amax``: the per-tensor amax of an operand that tensor parallelism shards is all-reduced over
    the tensor-parallel group (``tensor_parallel``: the single process's numbers) or taken from the
    rank's own shard (``rank``: no collective).
    ``mxfp4_emulation``: what carries MXFP4 to tensor cores without FP4 (Hopper): ``fp8``, an E4M3
    under one power of two a row, at FP8's speed (metrics rows count what it could not hold exactly
    as ``mxfp4_inexact``), or ``bf16``, exact.
    """

    name: str = "bf16"
    fprop: RecipeFprop = field(default_factory=RecipeFprop)  # type: ignore[valid-type]
    dgrad: RecipeDgrad = field(default_factory=RecipeDgrad)  # type: ignore[valid-type]
    wgrad: RecipeWgrad = field(default_factory=RecipeWgrad)  # type: ignore[valid-type]
    keep: KeepConfig = field(default_factory=KeepConfig)  # type: ignore[valid-type]
    tail: TailConfig = field(default_factory=TailConfig)  # type: ignore[valid-type]
    amax: str = "tensor_parallel"
    backend: str = "auto"
    mxfp4_emulation: str = "fp8"


@dataclass
class RunConfig:
    """One run. ``baseline``: null, or the recipe to train first and compare with."""

    model: ModelConfig = field(default_factory=ModelConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    seed: int = 1234
    name: str | None = None
    run_dir: str | None = None
    resume: str | None = None
    baseline: str | None = None


def _register() -> None:
    store = ConfigStore.instance()
    store.store(name="schema", node=RunConfig)
    for group, node in (
        ("model", ModelConfig),
        ("data", DataConfig),
        ("optim", OptimConfig),
        ("parallel", ParallelConfig),
        ("precision", PrecisionConfig),
        ("logging", LoggingConfig),
    ):
        store.store(group=group, name="schema", node=node)


_register()


def compose(overrides: list[str]) -> RunConfig:
    """``configs/train.yaml`` with overrides in Hydra's grammar, as a checked RunConfig.

    Raises UserError, one line naming key and cure, for anything unknown or impossible. Checks that
    need the number of ranks are in ``fp4pretrain.model.layout``.
    """
    keys = schema_keys()
    refuse_unknown(overrides, keys=keys)
    overrides = [text for text in overrides if not names_nothing(text)]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            composed = hydra_compose("train", overrides=overrides)
        # Once more through the schema: an interpolation of a whole section is not checked before.
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RunConfig), plain))
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise UserError(one_line(error, overrides, keys=keys)) from None
    assert isinstance(config, RunConfig)
    check(config)
    plan_of(config)
    return config


@cache
def schema_keys() -> frozenset[str]:
    """Every key a user can set, dotted, with the sections themselves."""

    def below(node: Any, prefix: str) -> Iterator[str]:
        for f in dataclasses.fields(node):
            key = f"{prefix}{f.name}"
            yield key
            if dataclasses.is_dataclass(getattr(node, f.name)):
                yield from below(getattr(node, f.name), f"{key}.")

    return frozenset(below(RunConfig(), ""))


def plan_of(config: RunConfig) -> Plan:
    """The frozen Plan that the precision section describes."""
    p = config.precision

    def frozen(cls: type, node: Any, **nested: Any) -> Any:
        values = {f.name: getattr(node, f.name) for f in dataclasses.fields(cls)}
        values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return cls(**values | nested)

    def gemm(cls: type, node: Any, name: str) -> Any:
        specs: dict[str, Any] = {"fast_accum": node.fast_accum}
        for f in dataclasses.fields(cls):
            if f.name in specs:
                continue
            kind = Rotation if f.name == "rotation" else QuantSpec
            try:
                specs[f.name] = frozen(kind, getattr(node, f.name))
            except UserError as error:
                text = str(error).removeprefix("rotation.")
                raise UserError(f"precision.{name}.{f.name}.{text}") from None
        return cls(**specs)

    recipe = Recipe(
        fprop=gemm(Fprop, p.fprop, "fprop"),
        dgrad=gemm(Dgrad, p.dgrad, "dgrad"),
        wgrad=gemm(Wgrad, p.wgrad, "wgrad"),
    )
    return Plan(
        recipe=recipe,
        num_layers=config.model.num_layers,
        keep=frozen(Keep, p.keep),
        tail=frozen(Tail, p.tail),
    )
