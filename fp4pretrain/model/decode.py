"""Decoding: one forward pass over a prompt, then one position at a time, with keys and values kept.

megatron-core's static inference context keeps them; it is what its attention takes.
"""

from __future__ import annotations

import torch
from megatron.core.inference.contexts import StaticInferenceContext

from fp4pretrain.model.build import GPT


class Decoder:
    """Feeds a model in evaluation mode. ``batch``: texts side by side, of equal length; ``length``:
    positions that there is memory for; ``first``: the learned position of the first token (rotary ones
    are relative). One process: no tensor parallelism, no pipeline."""

    def __init__(self, gpt: GPT, *, batch: int, length: int, first: int = 0) -> None:
        self._gpt = gpt
        self._first = first
        self._context = StaticInferenceContext(batch, length)
        self._context.materialize_only_last_token_logits = True

    def __call__(self, ids_bs: torch.Tensor) -> torch.Tensor:
        """Logits [b, padded vocabulary] of what follows the last of the ids [b, s], which continue those
        of the calls before."""
        begin, count = self._context.sequence_len_offset, ids_bs.shape[1]
        first = self._first + begin
        positions = torch.arange(first, first + count, device=ids_bs.device).expand_as(ids_bs)
        with torch.no_grad():
            logits = self._gpt(
                ids_bs,
                positions,
                attention_mask=None,
                inference_context=self._context,
                runtime_gather_output=True,
            )
        self._context.sequence_len_offset += count
        self._context.enable_decode_mode()
        return logits[:, -1]
