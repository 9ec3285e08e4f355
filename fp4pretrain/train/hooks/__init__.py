"""Everything around the steps: logging, evaluation, checkpoints, signals. One file each."""

from fp4pretrain.train.hooks.checkpointing import Checkpointing
from fp4pretrain.train.hooks.evaluation import Evaluation
from fp4pretrain.train.hooks.logging import Logging
from fp4pretrain.train.hooks.signals import Signals

__all__ = ["Checkpointing", "Evaluation", "Logging", "Signals"]
