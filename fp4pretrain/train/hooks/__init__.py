"""Everything around the steps: logging, evaluation, checkpoints, signals, profiles. One file each."""

from fp4pretrain.train.hooks.checkpointing import Checkpointing
from fp4pretrain.train.hooks.evaluation import Evaluation
from fp4pretrain.train.hooks.logging import Logging
from fp4pretrain.train.hooks.profiling import Profiling
from fp4pretrain.train.hooks.signals import Signals

__all__ = ["Checkpointing", "Evaluation", "Logging", "Profiling", "Signals"]
