"""The run config: every key a user can set, with its default and its check, in one place.

The dataclasses below are Hydra's schema. YAML files in ``configs/`` fill them in, command-line
overrides change them, and an unknown key or value fails here, while composing. ``RunConfig`` is
plain data; nothing below this module imports Hydra.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fp4pretrain.checks import check, check_triggers
from fp4pretrain.errors import UserError
from fp4pretrain.fingerprint import check_names
from fp4pretrain.naming import recipe_name
from fp4pretrain.overrides import (
    adding_rules,
    names_nothing,
    naming_files,
    one_line,
    refuse_unknown,
)
from fp4pretrain.precision import GEMMS, Plan, Recipe
from fp4pretrain.precision.rules import BLOCK_LINEARS
from fp4pretrain.precision_config import PrecisionConfig, fill_rules, plan_from
from fp4pretrain.presets import config_dir, groups, offer, own, search_path
from fp4pretrain.units import tokens_of


@dataclass
class ModelConfig:
    """A dense GPT. Sizes are global (before tensor parallelism).

    ``qk_norm``: queries and keys are normalized for each head (arXiv:2010.04245, 2302.05442).
    ``z_loss``: this times the squared logarithm of the softmax's denominator joins what is minimized
    (arXiv:2204.02311, 1e-4 there), never what is logged. ``attention_softcap``: scores s become
    cap * tanh(s / cap) (arXiv:2408.00118, 50 there); null is off.
    """

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
    qk_norm: bool = False
    z_loss: float = 0.0
    attention_softcap: float | None = None


@dataclass
class DataConfig:
    """What to train on. ``path``: null for the running Python's standard library, a prefix of an
    indexed dataset, or a blend: a list of prefixes, or ``{name: {prefix: ..., weight: ...}}``.

    ``split``: shares of training, validation and test; a hash of its content puts a document on one
    side. ``valid``: other text to validate on, a prefix or ``{name: prefix}``, the first of them in
    ``val_loss``. ``valid_tokens``: so many tokens of a validation set are read (null: all).
    ``seed`` decides the order of the training data; null is the run's ``seed``. ``document_mask``:
    attention stops at the token that ends a document; ``reset_positions``: positions begin again behind
    it; ``eod_mask_loss``: what follows it is not predicted.
    """

    path: Any = None
    tokenizer: str = "byte"
    split: str = "0.98,0.02,0"
    valid: Any = None
    valid_tokens: Any = 4_000_000
    seed: int | None = None
    cache_dir: str | None = None
    mock: bool = False
    document_mask: bool = False
    reset_positions: bool = False
    eod_mask_loss: bool = False


@dataclass
class OptimConfig:
    """AdamW with FP32 masters; ``schedule`` wsd (warmup, stable, decay) or cosine.

    ``warmup`` and ``decay`` are fractions of the run (0.1), steps (200) or tokens (2M);
    ``params_dtype`` is what the GEMMs read (bf16, or fp32 to separate effects).
    """

    lr: float = 1e-3
    min_lr: float = 1e-5
    schedule: str = "wsd"
    warmup: Any = 0.1
    decay: Any = 0.2
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
    builds the index of a dataset)."""

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
    """Lengths in optimizer steps; ``micro_batch`` and ``global_batch`` in sequences.

    ``tokens`` (100M) sets ``steps`` to as many as it takes. ``sum_order`` n reads the sequences of
    every microbatch rotated by n: the same sums in another order, to see what rounding alone does.
    """

    steps: int = 200
    tokens: Any = None
    micro_batch: int = 8
    global_batch: int = 16
    log_interval: int = 1
    eval_interval: int = 50
    eval_bf16: bool = True
    sum_order: int = 0


@dataclass
class CheckpointConfig:
    """``interval`` in steps (0: only the end of the run).

    ``keep_last`` complete ones are kept, and those whose step ``keep_every`` divides (0: none).
    ``asynchronous``: files are written while training goes on, from a copy in host memory.
    """

    interval: int = 0
    keep_last: int = 2
    keep_every: int = 0
    at_end: bool = True
    asynchronous: bool = True


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


# The statistics that need no second cast and no copy of a tensor.
OBSERVED = (
    "sqnr", "cosine", "underflow", "saturation", "kurtosis", "crest", "amax_spread", "scales",
)  # fmt: skip


@dataclass
class ObserveConfig:
    """Every ``interval`` steps (0: off) the casts of the selected operands are measured.

    ``blocks``, ``linears``, ``gemms`` as in ``precision.rules``; ``statistics``: see
    ``fp4pretrain.observe.statistics``; ``draws``: casts more for the statistic of that name.
    """

    interval: int = 0
    blocks: Any = None
    linears: list[str] = field(default_factory=lambda: list(BLOCK_LINEARS))
    gemms: list[str] = field(default_factory=lambda: list(GEMMS))
    operands: list[str] = field(default_factory=lambda: ["x", "w", "dy"])
    statistics: list[str] = field(default_factory=lambda: list(OBSERVED))
    draws: int = 4


@dataclass
class WandbConfig:
    """``mode`` auto: $WANDB_MODE, or online where an API key is set and offline otherwise. ``project``
    null: $WANDB_PROJECT, or fp4pretrain. What is null or empty is what wandb's own variables say. Runs of
    one command share a ``group``, and their ``job_type`` is baseline or train, where nothing says it."""

    mode: str = "auto"
    project: str | None = None
    entity: str | None = None
    group: str | None = None
    job_type: str | None = None
    name: str | None = None
    tags: list[str] = field(default_factory=list)


@dataclass
class LoggingConfig:
    """``tensorboard``: event files in the run's folder too, which need the package of that name."""

    wandb: WandbConfig = field(default_factory=WandbConfig)
    tensorboard: bool = False
    console: str = "auto"


@dataclass
class SweepConfig:
    """How the runs of one command are started; no part of any run.

    ``budget``: a time (90s, 30m, 2h) after which no run starts and those that go on save and stop.
    ``launcher``: ``here``, one after the other in this process and its ranks; ``processes``, each run in
    processes of its own, ``jobs`` runs at once on each GPU, or on the CPU; ``slurm``, each run a job, and
    ``jobs`` of them at once (0: as many as the cluster takes). ``ranks``: processes of a run on a node,
    each with a GPU of its own where there are any (not for ``here``: torchrun says how many). ``slurm``:
    null, or what sbatch is told, such as {partition: gpu, time: 720, nodes: 2}.
    """

    budget: Any = None
    launcher: str = "here"
    jobs: int = 1
    ranks: int = 1
    slurm: Any = None


@dataclass
class RunConfig:
    """One run. ``baseline``: null, the recipe to train first and compare with, or the folder of a run
    whose validation losses each evaluation is held against.

    ``seed``: initial weights, rounding noise and dropout. ``resume``: null, ``auto``, a checkpoint, or
    ``restart``: from the beginning in a folder whose checkpoints are gone. ``resume_with``: keys or
    sections that may differ from the checkpoint's run, such as ``[optim.lr,precision]``. ``init``: null,
    or a Hugging Face model's local folder, whose weights a fresh run begins with.
    """

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
    observe: ObserveConfig = field(default_factory=ObserveConfig)
    sweep: SweepConfig = field(default_factory=SweepConfig)
    seed: int = 1234
    name: str | None = None
    run_dir: str | None = None
    resume: str | None = None
    resume_with: list[str] = field(default_factory=list)
    init: str | None = None
    baseline: str | None = None


@dataclass
class _LoosePrecision(PrecisionConfig):
    """While Hydra composes: it cannot add a rule to a map whose values have a type."""

    rules: dict[str, Any] = field(default_factory=dict)  # type: ignore[assignment]


@dataclass
class _LooseRun(RunConfig):
    precision: _LoosePrecision = field(default_factory=_LoosePrecision)


_store = ConfigStore.instance()
_store.store(name="schema", node=_LooseRun)
for _group in ("model", "data", "optim", "parallel", "train", "precision", "logging"):
    _store.store(group=_group, name="schema", node=type(getattr(_LooseRun(), _group)))


class _OwnConfigs(SearchPathPlugin):
    """Hydra looks into a user's own folders before it looks into ours."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        for folder in reversed(_own_folders()):
            search_path.prepend("own", f"file://{folder}", anchor="main")


def _own_folders() -> list[Path]:
    return [folder for folder in search_path() if folder != config_dir()]


Plugins.instance().register(_OwnConfigs)


def compose(overrides: Sequence[str]) -> RunConfig:
    """``configs/train.yaml`` with overrides in Hydra's grammar, as a checked RunConfig.

    A group takes an option's name or the path of a YAML file. Raises UserError, one line naming key and
    cure, for anything unknown or impossible. Checks that need the number of ranks are in
    ``fp4pretrain.model.layout``.
    """
    keys = schema_keys()
    overrides = naming_files(overrides)
    refuse_unknown(overrides, keys=keys)
    overrides = [text for text in overrides if not names_nothing(text)]
    composed, choices = _composed(tuple(overrides), keys, own())
    config = OmegaConf.to_object(composed)
    assert isinstance(config, RunConfig)
    given = {text.partition("=")[0] for text in overrides}
    if "precision" not in choices:
        raise UserError("precision: ~precision leaves no recipe; leave it out, or choose bf16")
    config.precision.name = recipe_name(
        asdict(config.precision),
        option=choices["precision"],
        experiment=choices.get("experiment"),
        plain=lambda override: _plain_recipe(override, keys, own()),
        given=given,
    )
    fill_rules(config.precision, lambda name: _named_recipe(name, own()))
    return completed(config, given)


def completed(config: RunConfig, given: Collection[str]) -> RunConfig:
    """The config with its lengths in steps and tokens, checked. ``given``: keys that the user set.

    Raises UserError.
    """
    if config.train.tokens is not None:
        if "train.steps" in given and "train.tokens" in given:
            raise UserError("train.tokens: train.steps says another length; give one of them")
        total = tokens_of(config.train.tokens, key="train.tokens")
        a_step = config.train.global_batch * config.model.seq_length
        config.train.steps = -(-total // max(1, a_step))
    if config.data.valid_tokens is not None:
        config.data.valid_tokens = tokens_of(config.data.valid_tokens, key="data.valid_tokens")
    check(config)
    check_names(config.resume_with, schema_keys())
    check_triggers(config, plan_of(config))
    return config


@lru_cache(maxsize=64)  # half a second each, and one process asks for the same more than once
def _composed(
    overrides: tuple[str, ...], keys: frozenset[str], own: tuple[object, ...]
) -> tuple[Any, dict[str, Any]]:
    """The composed config under the schema, and the option chosen of every group. ``own``: which files
    of the user's there were to choose from."""
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_dir()), version_base="1.3"):
            composed = hydra_compose(
                "train", overrides=adding_rules(overrides), return_hydra_config=True
            )
        choices = dict(composed.hydra.runtime.choices)
        sections = [f.name for f in dataclasses.fields(RunConfig)]
        composed = OmegaConf.masked_copy(composed, sections)
        # Once more through the schema: an interpolation of a whole section is not checked before.
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        merged = OmegaConf.merge(OmegaConf.structured(RunConfig), plain)
        OmegaConf.to_object(merged)
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        raise UserError(one_line(error, list(overrides), keys=keys)) from None
    except RecursionError:
        raise UserError(
            f"{', '.join(overrides)}: the defaults of a file lead back to it; name another file there"
        ) from None
    return merged, choices


@cache
def _plain_recipe(override: str, keys: frozenset[str], own: tuple[object, ...]) -> dict[str, Any]:
    """The precision section of a recipe's or experiment's file as it stands."""
    composed, _ = _composed((override,), keys, own)
    section: dict[str, Any] = OmegaConf.to_container(composed.precision)  # type: ignore[assignment]
    return section


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
    return plan_from(config.precision, config.model.num_layers)


@cache
def _named_recipe(name: str, own: tuple[object, ...]) -> Recipe:
    """The recipe of an option of ``precision``; ``own``: as for ``_composed``."""
    offered = groups()["precision"]
    if name not in offered:
        raise UserError(f"{name!r} is no recipe; choose {offer(name, offered)}")
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        composed = hydra_compose("train", overrides=[f"precision={name}"])
    plain = OmegaConf.to_container(composed.precision, resolve=True)
    precision = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(PrecisionConfig), plain))
    assert isinstance(precision, PrecisionConfig)
    return plan_from(precision, 1_000, rules=False).recipe
