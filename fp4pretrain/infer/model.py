"""A run's model on one process, whatever layout trained it: weights and recipe, no optimizer, no data."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from fp4pretrain.config import ParallelConfig, plan_of
from fp4pretrain.convert.tokenizer import fitting_tokenizer
from fp4pretrain.data import Tokenizer, document_places
from fp4pretrain.model import build_model, model_config
from fp4pretrain.model.build import GPT
from fp4pretrain.nn.attention import document_mask
from fp4pretrain.nn.clock import Clock
from fp4pretrain.ops import choose
from fp4pretrain.parallel.groups import join, pick_device
from fp4pretrain.precision import BF16
from fp4pretrain.train.checkpoint import restore_weights
from fp4pretrain.train.stored import StoredRun

PRECISIONS = ("bf16", "recipe")


@dataclass(frozen=True)
class Model:
    """``gpt`` in evaluation mode on ``device``; ``precision``: bf16, or the run's recipe."""

    run: StoredRun
    gpt: GPT
    tokenizer: Tokenizer
    device: torch.device
    precision: str

    @property
    def length(self) -> int:
        """Positions that the model was trained on, the longest text it takes."""
        return self.run.config.model.seq_length

    def logits(self, ids_bs: torch.Tensor) -> torch.Tensor:
        """Of each id's successor: FP32 [b, s, vocabulary] of ids [b, s]; document masks and positions
        follow the same keys as in training."""
        ids_bs, data = ids_bs.to(self.device), self.run.config.data
        positions = torch.arange(ids_bs.shape[1], device=self.device).expand_as(ids_bs)
        documents, restarted = document_places(ids_bs == self.tokenizer.eod)
        mask = None
        if data.document_mask and bool(documents[:, -1].any()):
            mask = document_mask(documents, dtype=self.gpt.config.params_dtype)
        with torch.no_grad():
            logits = self.gpt(
                ids_bs, restarted if data.reset_positions else positions, attention_mask=mask
            )
        return logits[..., : self.run.config.model.vocab_size].float()


def load_model(
    run: StoredRun,
    *,
    precision: str = "bf16",
    device: str = "auto",
    tokenizer: str | None = None,
) -> Model:
    """Build the model of ``run`` and read its checkpoint. Joins groups of one rank: ``leave`` them.

    Args:
        precision: ``bf16`` for every linear, or ``recipe``: as in the run's last step, so that a loss is
            its ``val_loss``. There a scale spans what is computed at once: one position at a time gives
            other numbers than a whole text.
        device: auto, cpu or cuda.
        tokenizer: in place of the run's ``data.tokenizer``.

    Raises:
        UserError: for a tokenizer that does not fit, a damaged checkpoint, a device that is not there.
    """
    found = fitting_tokenizer(
        tokenizer or run.config.data.tokenizer, vocab_size=run.config.model.vocab_size
    )
    model = replace(run.config.model, implementation="fp4pretrain")  # whose modules run anywhere
    config = replace(run.config, model=model, parallel=ParallelConfig(device=device))
    world = join(device=pick_device(device), seed=config.seed)
    plan = plan_of(config)
    emulation = config.precision.mxfp4_emulation
    backend, _ = choose("auto", plan, world.device, mxfp4_emulation=emulation)
    clock = Clock(config.seed, step=run.step)
    (gpt,), binding = build_model(
        config, plan, backend=backend, clock=clock, transformer=model_config(config)
    )
    if config.optim.params_dtype == "bf16":
        gpt.bfloat16()  # what megatron-core's Float16Module does in training
    restore_weights(gpt, run.checkpoint)
    clock.weights_changed()
    binding.sites.restore(run.amaxes, run.step)
    binding.sites.recording = False
    if precision == "recipe":
        binding.apply(run.last_moment)
    else:
        binding.set_recipes([BF16] * len(binding.linears))
    gpt.eval()
    return Model(run, gpt, found, world.device, precision)
