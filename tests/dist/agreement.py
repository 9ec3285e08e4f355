"""Sharded equals single: every layout computes one process's losses and gradients.

Weights, data, rotation signs and rounding noise are functions of global names and coordinates, so a
layout may differ from one process only in the order of floating-point sums. Parameters are FP32 here
(``optim.params_dtype=fp32``), which makes that difference about 1e-7 of a value. What it can do:

- Pipeline and data parallelism leave all sums inside a microbatch alone. Data parallelism adds the
  microbatches' gradients in another order: 1e-6 of the gradient. The first loss is the same number.
- Tensor parallelism splits the sums over k in row-parallel linears. A value that lies within 1e-7 of
  a rounding boundary then takes the neighbouring code, and that element moves by one step of its
  format: 2^-8 (BF16), 2^-3 (E4M3), 2^-2 (E5M2), up to 1/3 (E2M1). About one element in a million
  does. A gradient sums products of 512 tokens here, so one moved element changes a whole gradient by
  about step / sqrt(512) of one column's part of it: up to 2e-4, 1e-2 and 2e-2. GRADIENT allows two.
- From the second step on, Adam divides by the gradient's own size, which makes a moved element in a
  small gradient a different update; losses are still averages over 512 tokens and agree to 2e-4.

A shard scaled by its own amax in place of the tensor's (the test below) misses these by far.
"""

from __future__ import annotations

from pathlib import Path

import torch
from ranks import Ranks

SMALL = (
    "model.num_layers=4 model.hidden_size=64 model.num_attention_heads=4 model.num_query_groups=2 "
    "model.ffn_hidden_size=128 model.seq_length=64 train.micro_batch=2 train.global_batch=8 "
    "train.steps=10 data.valid_tokens=256 optim.params_dtype=fp32 data.mock=true"
).split()
STEPS = 3

SAME_LOSS = 1e-6
LATER_LOSS = 1e-3
SUM_ORDER = 2e-6
GRADIENT = {"bf16": 5e-4}
GRADIENT |= dict.fromkeys(("fp8", "fp8_block", "fp8_delayed", "mxfp8"), 1e-2)
GRADIENT |= dict.fromkeys(("nvfp4", "int4", "mxfp4_rht_sr", "mxfp4_h16"), 3e-2)
GRADIENT |= dict.fromkeys(("quartet2", "averis", "ue5m3"), 3e-2)

_singles: dict[tuple, dict] = {}


def single(ranks: Ranks, overrides: list[str]) -> dict:
    """One process's reply, computed once."""
    key = (id(ranks), *overrides)
    if key not in _singles:
        _singles[key] = ranks.run("first_steps", overrides, size=1, steps=STEPS)
    return _singles[key]


def gradients(reply: dict, step: int) -> dict[str, torch.Tensor]:
    """Whole gradients of a step by name, of all pipeline stages."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(Path(reply["out"]).glob(f"step{step}_stage*.pt")):
        found |= torch.load(file)
    return found


def gradient_error(reply: dict, reference: dict, step: int = 0) -> float:
    """Relative error of the whole gradient, all parameters together."""
    mine, theirs = gradients(reply, step), gradients(reference, step)
    # A tied head on a stage of its own is a copy of the embedding, whose gradient holds both.
    names = theirs.keys()
    assert names <= mine.keys() <= names | {"output_layer.weight"}
    error = sum(float((mine[n] - theirs[n]).double().square().sum()) for n in names)
    return (error / sum(float(theirs[n].double().square().sum()) for n in names)) ** 0.5


def losses(reply: dict) -> list[float]:
    return [row["loss"] for row in reply["rows"]]


def agree(
    reply: dict,
    reference: dict,
    *,
    recipe: str,
    splits_sums: bool,
    first: float = SAME_LOSS,
    gradient: float | None = None,
) -> None:
    """``first`` and ``gradient``: what the first loss and gradient may differ by, None: as said above."""
    if gradient is None:
        gradient = GRADIENT[recipe.split()[0]] if splits_sums else SUM_ORDER
    gaps = [abs(a / b - 1) for a, b in zip(losses(reply), losses(reference), strict=True)]
    error = gradient_error(reply, reference)
    print(f"{recipe}: first loss {gaps[0]:.1e}, later {max(gaps):.1e}, gradient {error:.1e}")
    assert gaps[0] <= first, gaps
    assert max(gaps) <= LATER_LOSS, gaps
    assert error <= gradient
