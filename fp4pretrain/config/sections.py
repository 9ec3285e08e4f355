"""Hydra's schema: every key a user can set, with its default, as plain data without Hydra."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fp4pretrain.precision import GEMMS
from fp4pretrain.precision.rules import BLOCK_LINEARS
from fp4pretrain.precision_config import PrecisionConfig


@dataclass
class ModelConfig:
    """A dense GPT. Sizes are global (before tensor parallelism).

    ``qk_norm``: queries and keys are normalized for each head (arXiv:2010.04245, 2302.05442).
    ``z_loss``: this times the squared logarithm of the softmax's denominator joins what is minimized
    (arXiv:2204.02311, 1e-4 there), never what is logged. ``attention_softcap``: scores s become
    cap * tanh(s / cap) (arXiv:2408.00118, 50 there); null is off. ``implementation``: fp4pretrain, or
    transformer_engine: blocks of that package's modules, to compare with (``model/engine.py``).
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
    implementation: str = "fp4pretrain"


@dataclass
class DataConfig:
    """What to train on. ``path``: null for the running Python's standard library, a prefix of an
    indexed dataset, or a blend: a list of prefixes, or ``{name: {prefix: ..., weight: ...}}``.

    ``split``: shares of training, validation and test; a hash of its content puts a document on one
    side. ``valid``: other text to validate on, a prefix or ``{name: prefix}``, the first of them in
    ``val_loss``. ``valid_tokens``: so many tokens of a validation set are read (null: all).
    ``seed`` decides the order of the training data; null is the run's ``seed``. ``document_mask``:
    attention stops at the token that ends a document; ``reset_positions``: positions begin again behind
    it; ``eod_mask_loss``: what follows it is not predicted. ``workers``: processes of each rank that read
    ahead of the steps (0: the rank reads, on GPUs while a captured step runs).
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
    workers: int = 0


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

    ``overlap``: on GPUs, data parallelism adds gradients up beside the backward pass and gathers weights
    beside the next forward pass. ``timeout_minutes``: how long a rank waits for the others before it fails
    (also while rank 0 builds the index of a dataset)."""

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

    ``tokens`` (100M) sets ``steps`` to the number of steps that read so many tokens. ``sum_order`` n reads
    the sequences of every microbatch rotated by n: the same sums in another order, to see what rounding
    alone does.
    ``graph``: whether steps are captured as a CUDA graph and replayed: auto (where they can be), always (or
    an error) or never. ``fusion``: auto, norms with the sums before them, activations, linears' biases, the
    split of queries, keys and values, embeddings' gradients, cross entropy and AdamW by fused kernels where
    there is a GPU for them, or never. ``packed_weights``: casts of weights wait packed (nvfp4, mxfp4; FP8
    under one scale: once, not twice) and are expanded for each GEMM: less memory, the same numbers, slower.
    ``deterministic``: kernels of GPUs that add in a fixed order, so that two runs of one config, or a run and
    its restart, are the same bits; they are slower. CPUs always do.
    """

    steps: int = 200
    tokens: Any = None
    micro_batch: int = 8
    global_batch: int = 16
    log_interval: int = 1
    eval_interval: int = 50
    eval_bf16: bool = True
    sum_order: int = 0
    graph: str = "auto"
    fusion: str = "auto"
    packed_weights: bool = False
    deterministic: bool = False


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

    Mean and deviation follow about ``window`` steps; the first ``warmup`` losses only feed the mean and
    deviation.
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
    null: $WANDB_PROJECT, or fp4pretrain. Keys that are null or empty come from wandb's own environment
    variables. Runs of
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
    """One run. ``baseline``: null, the recipe to train first and compare with, or a run (its folder,
    wandb:ENTITY/PROJECT/RUN_ID, or its address on wandb) whose validation losses each evaluation is held
    against.

    ``seed``: initial weights, rounding noise and dropout. ``resume``: null, ``auto``, a checkpoint, or
    ``restart``: from the beginning in a folder whose checkpoints are gone. ``resume_with``: keys or
    sections that may differ from the checkpoint's run, such as ``[optim.lr,precision]``. ``init``: null,
    or the local folder of a Hugging Face model or a megatron-core checkpoint, whose weights a fresh run
    begins with.
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
