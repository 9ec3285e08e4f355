"""Which values a run config may hold: everything that can be refused without knowing the ranks.

What needs the number of ranks is in ``fp4pretrain.model.layout``, what needs files in
``fp4pretrain.data`` and ``fp4pretrain.train.run_dir``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fp4pretrain.baseline import is_recipe, wandb_path
from fp4pretrain.errors import UserError
from fp4pretrain.files import user_path
from fp4pretrain.presets import groups, offer
from fp4pretrain.units import seconds_of, steps_of

if TYPE_CHECKING:
    from fp4pretrain.config import ModelConfig, RunConfig, SweepConfig, WandbConfig
    from fp4pretrain.precision import Plan

CHOICES = {
    "model.activation": ("swiglu", "gelu", "squared_relu"),
    "model.normalization": ("rmsnorm", "layernorm"),
    "model.position": ("rope", "learned"),
    "model.implementation": ("fp4pretrain", "transformer_engine"),
    "optim.schedule": ("wsd", "cosine"),
    "optim.decay_shape": ("linear", "cosine", "exponential", "minus_sqrt"),
    "optim.params_dtype": ("bf16", "fp32"),
    "parallel.recompute": ("none", "full", "selective"),
    "train.graph": ("auto", "always", "never"),
    "train.fusion": ("auto", "never"),
    "parallel.device": ("auto", "cpu", "cuda"),
    "precision.amax": ("tensor_parallel", "rank"),
    "precision.backend": ("auto", "reference", "cpp", "triton", "native", "transformer_engine"),
    "precision.mxfp4_emulation": ("fp8", "bf16"),
    "guard.spike.action": ("none", "report", "rollback"),
    "guard.hang_action": ("restart", "report"),
    "sweep.launcher": ("here", "processes", "slurm"),
    "logging.wandb.mode": ("auto", "online", "offline", "disabled"),
    "logging.console": ("auto", "progress", "lines", "quiet"),
}

_LARGE = 2**31  # sizes and counts end up in 32-bit fields of libraries
_SEEDS = 2**32  # numpy's legacy generator, which orders the samples, takes 32 bits

POSITIVE = (
    "model.num_layers",
    "model.hidden_size",
    "model.ffn_hidden_size",
    "model.num_attention_heads",
    "model.num_query_groups",
    "model.kv_channels",
    "model.seq_length",
    "model.vocab_size",
    "model.norm_epsilon",
    "model.rotary_base",
    "model.attention_softcap",
    "optim.lr",
    "optim.eps",
    "train.steps",
    "train.micro_batch",
    "train.global_batch",
    "train.log_interval",
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.virtual_pipeline",
    "parallel.context",
    "checkpoint.keep_last",
    "sweep.ranks",
    "guard.spike.threshold",
    "guard.spike.window",
    "guard.spike.warmup",
    "guard.spike.patience",
)
NOT_NEGATIVE = (
    "model.init_std",
    "model.z_loss",
    "optim.min_lr",
    "optim.weight_decay",
    "optim.clip",
    "train.eval_interval",
    "train.sum_order",
    "checkpoint.interval",
    "checkpoint.keep_every",
    "guard.max_skipped",
    "guard.skip_batches",
    "guard.max_rollbacks",
    "guard.hang_timeout",
    "profile.start",
    "profile.steps",
    "observe.interval",
    "sweep.jobs",
)
BELOW_ONE = ("optim.beta1", "optim.beta2", "model.attention_dropout", "model.hidden_dropout")
# Optional texts: null means none, and an empty text is refused.
NOT_EMPTY = (
    "name",
    "run_dir",
    "resume",
    "init",
    "precision.name",
    "data.tokenizer",
    "data.cache_dir",
)


# Keys of a member of a blend.
_MEMBER = ("prefix", "weight", "epochs", "max_epochs", "max_tokens")


def check(config: RunConfig) -> None:
    """Raises UserError, one line naming key and cure, for a value that cannot be meant."""

    def value(key: str) -> Any:
        node: Any = config
        for part in key.split("."):
            node = getattr(node, part)
        return node

    def require(keys: tuple[str, ...], low: float, high: float, cure: str) -> None:
        for key in keys:  # a NaN fails every comparison, and null is for the schema to refuse
            if value(key) is not None and not low <= value(key) < high:
                raise UserError(f"{key}: {value(key)} is out of range; give {cure}")

    for key, allowed in CHOICES.items():
        if value(key) not in allowed:
            raise UserError(f"{key}: {value(key)!r} is unknown; choose {', '.join(allowed)}")
    require(POSITIVE, 5e-324, _LARGE, "a number above 0 and below 2^31")
    require(NOT_NEGATIVE, 0, _LARGE, "0 or a number above, below 2^31")
    require(BELOW_ONE, 0, 1, "a number from 0 to below 1")
    require(("parallel.timeout_minutes",), 0.1, 10_001, "minutes from 0.1 to 10000 (a week)")
    require(("observe.draws",), 2, 1025, "a number from 2 to 1024")
    require(("data.workers",), 0, 129, "a whole number from 0 to 128")
    require(("seed", "data.seed"), 0, _SEEDS, "a whole number from 0 to 2^32 - 1")
    for key in NOT_EMPTY:
        if value(key) == "":
            raise UserError(f"{key}: it is empty; give a name, or leave {key} out")
    if "/" in config.precision.name:
        raise UserError(
            f"precision.name: {config.precision.name!r} names a folder of runs; leave out the /"
        )
    _check_baseline(config.baseline)
    _check_sweep(config.sweep, resume=config.resume)
    _check_wandb(config.logging.wandb)
    _check_model(config.model)
    _check_schedule(config)
    _check_data_path(config.data.path)
    _check_data_valid(config.data.valid)
    if 0 < config.guard.hang_timeout < 1:
        raise UserError(
            f"guard.hang_timeout: {config.guard.hang_timeout} is shorter than steps are; give "
            "seconds from 1 on, or 0 to turn the watchdog off"
        )
    if config.guard.spike.action == "rollback" and config.checkpoint.interval == 0:
        raise UserError(
            "guard.spike.action: rollback has no checkpoint to go back to; set checkpoint.interval, "
            "or use report"
        )
    if config.train.sum_order >= config.train.micro_batch:
        raise UserError(
            f"train.sum_order: {config.train.sum_order} is no other order of "
            f"{config.train.micro_batch} sequences; give a number below train.micro_batch"
        )
    if config.train.global_batch % config.train.micro_batch:
        raise UserError(
            f"train.global_batch: {config.train.global_batch} is no multiple of train.micro_batch="
            f"{config.train.micro_batch}; change one"
        )


def _check_sweep(sweep: SweepConfig, *, resume: str | None) -> None:
    if sweep.launcher == "slurm" and resume not in (None, "auto"):
        raise UserError(
            f"resume: a job that is queued again would begin with {resume} each time; use resume=auto with "
            "sweep.launcher=slurm"
        )
    if sweep.budget is not None:
        seconds_of(sweep.budget, key="sweep.budget")
    if sweep.jobs == 0 and sweep.launcher != "slurm":
        raise UserError(
            "sweep.jobs: 0 is for sweep.launcher=slurm, whose queue says; give 1 or more"
        )
    if sweep.launcher == "here" and (sweep.jobs, sweep.ranks) != (1, 1):
        raise UserError(
            "sweep.launcher: here trains one run at a time, on the ranks of this command; add "
            "sweep.launcher=processes"
        )
    if sweep.slurm and sweep.launcher != "slurm":
        raise UserError("sweep.slurm: it says something to Slurm alone; add sweep.launcher=slurm")
    if sweep.slurm is not None and not isinstance(sweep.slurm, Mapping):
        raise UserError(
            f"sweep.slurm: {sweep.slurm!r} says nothing; write {{partition: gpu, time: 720}}"
        )
    nodes = (sweep.slurm or {}).get("nodes", 1)
    if not isinstance(nodes, int) or nodes < 1:
        raise UserError(f"sweep.slurm: nodes is {nodes!r}; give a whole number from 1")


def _check_baseline(named: str | None) -> None:
    if named is None or is_recipe(named) or wandb_path(named) is not None:
        return
    if not named or not user_path(named, key="baseline").is_dir():
        raise UserError(
            f"baseline: {named!r} is no recipe and no run's folder; choose "
            f"{offer(named, groups()['precision'])}, or give a run_dir, wandb:ENTITY/PROJECT/RUN_ID or the "
            "address of a run's page on wandb"
        )


def _check_wandb(w: WandbConfig) -> None:
    """Raises UserError for what wandb would refuse; it would then log nothing of the run."""
    for tag in w.tags:
        if not 1 <= len(tag) <= 64:
            raise UserError(
                f"logging.wandb.tags: {tag!r} has {len(tag)} characters; wandb takes 1 to 64"
            )
    for key in ("project", "group", "job_type", "name"):
        value = getattr(w, key)
        if value is not None and len(value) > 128:
            raise UserError(
                f"logging.wandb.{key}: it has {len(value)} characters; wandb takes 128 at most"
            )
    if w.project is not None and (wrong := sorted(set(w.project) & set("/\\#?%:"))):
        raise UserError(
            f"logging.wandb.project: {w.project!r} holds {''.join(wrong)}, which wandb does not take; "
            "leave it out"
        )


def _check_model(m: ModelConfig) -> None:
    groups_ = m.num_query_groups or m.num_attention_heads
    if m.num_attention_heads % groups_:
        raise UserError(
            f"model.num_query_groups: {groups_} does not divide model.num_attention_heads="
            f"{m.num_attention_heads}; change one"
        )
    if m.kv_channels is None and m.hidden_size % m.num_attention_heads:
        raise UserError(
            f"model.num_attention_heads: {m.num_attention_heads} does not divide "
            f"model.hidden_size={m.hidden_size}; change one or set model.kv_channels"
        )
    head_size = m.kv_channels or m.hidden_size // m.num_attention_heads
    if m.position == "rope" and head_size % 2:
        raise UserError(
            f"model.kv_channels: heads of {head_size} channels cannot be rotated in pairs; make "
            "them even or use model.position=learned"
        )


def _check_schedule(config: RunConfig) -> None:
    o, steps = config.optim, config.train.steps
    if o.min_lr > o.lr:
        raise UserError(f"optim.min_lr: {o.min_lr} is above optim.lr={o.lr}; lower it")
    warmup, decay = schedule_steps(config)
    if warmup >= steps:
        raise UserError(f"optim.warmup: it takes all {steps} steps; use a smaller fraction")
    if o.schedule == "wsd" and warmup + decay > steps:
        raise UserError(
            f"optim.decay: it begins before the warmup ends ({warmup} + {decay} of {steps} steps); "
            "lower optim.warmup or optim.decay"
        )


def schedule_steps(config: RunConfig) -> tuple[int, int]:
    """Steps of warmup and of decay. Raises UserError for what is neither fraction, steps nor tokens."""
    t = config.train
    size = {"steps": t.steps, "tokens_a_step": t.global_batch * config.model.seq_length}
    return (
        steps_of(config.optim.warmup, key="optim.warmup", **size),
        steps_of(config.optim.decay, key="optim.decay", **size),
    )


def _check_data_valid(valid: Any) -> None:
    """null, a prefix, or ``{name: prefix}``; files are for ``data``."""
    if valid is None or (isinstance(valid, str) and valid):
        return
    if not isinstance(valid, Mapping):
        raise UserError(
            f"data.valid: {valid!r} names no dataset; give null, some/prefix, or {{name: some/prefix}}"
        )


def _check_data_path(path: Any) -> None:
    """null, a prefix, or a blend, a map or a list; numbers and files are for ``data``."""
    shape = "give null, some/prefix, [some/prefix, ...], or {name: {prefix: some/prefix, weight: 1}, ...}"
    if path is None or (isinstance(path, str) and path):
        return
    if not isinstance(path, Mapping | list):
        raise UserError(f"data.path: {path!r} names no dataset; {shape}")
    for name, member in path.items() if isinstance(path, Mapping) else enumerate(path):
        for key in member if isinstance(member, Mapping) else ():
            if key not in _MEMBER:
                place = f"data.path.{name}" if isinstance(path, Mapping) else f"data.path[{name}]"
                raise UserError(f"{place}.{key}: no such key; use {', '.join(_MEMBER)}")


def check_triggers(config: RunConfig, plan: Plan) -> None:
    """Raises UserError for a rule whose trigger or release waits for what the run does not measure."""
    missing: dict[str, str] = {}
    if config.baseline is None:
        missing["gap"] = "it needs a baseline; set baseline=RECIPE, or the FOLDER of a run"
    elif not config.train.eval_interval:
        missing["gap"] = "it is measured at evaluations; set train.eval_interval"
    o = config.observe
    if not o.interval or "gradient_noise" not in o.statistics or "wgrad" not in o.gemms:
        missing["gradient_to_noise"] = (
            "observers measure it; set observe.interval, and leave gradient_noise in "
            "observe.statistics and wgrad in observe.gemms"
        )
    for rule in plan.ordered:
        for name in ("trigger", "release"):
            trigger = getattr(rule, name)
            if trigger is not None and trigger.quantity in missing:
                raise UserError(
                    f"{rule.key}.{name}: this run does not measure {trigger.quantity}: "
                    f"{missing[trigger.quantity]}"
                )
