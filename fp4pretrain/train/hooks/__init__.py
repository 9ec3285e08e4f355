"""Everything around the steps: logging, evaluation, checkpoints, guards, profiles,
observers of casts. One file each."""

from fp4pretrain.train.hooks.auditing import Auditing
from fp4pretrain.train.hooks.checkpointing import Checkpointing
from fp4pretrain.train.hooks.deoscillating import Deoscillating
from fp4pretrain.train.hooks.evaluation import Evaluation
from fp4pretrain.train.hooks.guards import Guard
from fp4pretrain.train.hooks.logging import Logging
from fp4pretrain.train.hooks.observing import Observing
from fp4pretrain.train.hooks.profiling import Profiling
from fp4pretrain.train.hooks.signals import Signals
from fp4pretrain.train.hooks.summarizing import Summarizing
from fp4pretrain.train.hooks.triggers import Triggers
from fp4pretrain.train.hooks.watchdog import Watchdog

__all__ = [
    "Auditing",
    "Checkpointing",
    "Deoscillating",
    "Evaluation",
    "Guard",
    "Logging",
    "Observing",
    "Profiling",
    "Signals",
    "Summarizing",
    "Triggers",
    "Watchdog",
]
