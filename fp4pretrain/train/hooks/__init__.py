"""Everything around the steps: logging, evaluation, checkpoints. One file each."""

from fp4pretrain.train.hooks.checkpointing import Checkpointing
from fp4pretrain.train.hooks.evaluation import Evaluation
from fp4pretrain.train.hooks.logging import Logging

__all__ = ["Checkpointing", "Evaluation", "Logging"]
