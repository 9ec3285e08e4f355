"""Another program's model as the start of a run: its weights in place of random ones (``init=FOLDER``).

A folder is Hugging Face's (config.json and safetensors) or a checkpoint of megatron-core. The run's model
section must say the model that is there; where it does not, one line has the keys to set. Nothing that a
file says is run.
"""

from __future__ import annotations

from typing import Protocol

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from fp4pretrain.config import ModelConfig
from fp4pretrain.files import user_path
from fp4pretrain.train.checkpoint import fill_weights
from fp4pretrain.train.initial.hugging_face import HuggingFaceSource
from fp4pretrain.train.initial.megatron import MegatronSource, is_megatron
from fp4pretrain.train.trainer import Trainer, unwrapped

__all__ = ["check_initial", "load_initial"]


class Source(Protocol):
    """Raises UserError, when made and while reading, where a folder is damaged or another model."""

    def part(self, leaf: ShardedTensor) -> torch.Tensor:
        """This rank's part of one of the model's tensors, of the leaf's shape and dtype."""


def load_initial(trainer: Trainer, folder: str) -> None:
    """Fill this rank's chunks and their masters from ``folder``; the optimizer stays as new.

    Raises UserError where the folder holds another model, or none that can be read.
    """
    source = _source(folder, trainer.config.model)
    for chunk in trainer.chunks:
        fill_weights(unwrapped(chunk), source.part)
    trainer.optimizer.reload_model_params()
    trainer.clock.weights_changed()


def check_initial(folder: str, model: ModelConfig) -> None:
    """Raises UserError as ``load_initial``, as far as that is known before tensors are read."""
    _source(folder, model)


def _source(folder: str, model: ModelConfig) -> Source:
    path = user_path(folder, key="init")
    return (MegatronSource if is_megatron(path) else HuggingFaceSource)(path, model)
