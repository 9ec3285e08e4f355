"""Sharded equals single: every layout computes one process's losses and gradients.

Weights, data, rotation signs and rounding noise are functions of global names and coordinates, so a
layout may differ from one process only in the order of floating-point sums. Parameters are FP32 here
(``optim.params_dtype=fp32``), which makes that difference about 1e-7 of a value. What it can do:

- Pipeline and data parallelism leave all sums inside a microbatch alone, but for one: fused kernels sum
  the gradient of a layer's last bias in another order at the end of a stage. Data parallelism adds the
  microbatches' gradients in another order: 1e-6 of the gradient. The first loss is the same number.
- Tensor parallelism splits the sums over k in row-parallel linears. A value that lies within 1e-7 of
  a rounding boundary then takes the neighbouring code, and that element moves by one step of its
  format: 2^-8 (BF16), 2^-3 (E4M3), 2^-2 (E5M2), up to 1/3 (E2M1). About one element in a million
  does. A gradient sums products of 512 tokens here, so one moved element changes a whole gradient by
  about step / sqrt(512) of one column's part of it: up to 2e-4, 1e-2 and 2e-2. GRADIENT allows two.
- From the second step on, Adam divides by the gradient's own size, which makes a moved element in a
  small gradient a different update; losses are still averages over 512 tokens and agree to 2e-4.

A shard scaled by its own amax in place of the tensor's (a test of ``test_layouts``) misses these by far.

Moved elements move others below them, so with depth the gradient of a recipe with few codes is chaotic: in
``grid.MODEL``, 8 layers deep, weights moved by their last bit change one process's NVFP4 gradient by
1.2e-1, and TP 2 changes it by 8.1e-2. ``nudge`` measures that; deep models are allowed as much.

On tensor cores the first loss of that model moves too. Their sums hold about 2^-22 of a value, so 2^-21 of
all elements lie that near to one of E2M1's boundaries and move by up to 1/3: a relative error of 2e-4 in each
product, 1e-3 after 32 of them, as much in each token's loss, and 1e-5 in the mean of 512 tokens (of BF16,
2e-6). DEEP_LOSS is that; four H100s showed up to 2.6e-6.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from ranks import Ranks

SMALL = (
    "model.num_layers=4 model.hidden_size=64 model.num_attention_heads=4 model.num_query_groups=2 "
    "model.ffn_hidden_size=128 model.seq_length=64 train.micro_batch=2 train.global_batch=8 "
    "train.steps=10 data.valid_tokens=256 optim.params_dtype=fp32 data.mock=true"
).split()
STEPS = 3 if torch.cuda.is_available() else 2  # on GPUs: rehearsed, captured, replayed

SAME_LOSS = 1e-6
DEEP_LOSS = 1e-5
LATER_LOSS = 1e-3
SUM_ORDER = 2e-6
GRADIENT = {"bf16": 5e-4}
GRADIENT |= dict.fromkeys(("fp8", "fp8_block", "fp8_delayed", "mxfp8"), 1e-2)
GRADIENT |= dict.fromkeys(("nvfp4", "int4", "mxfp4_rht_sr", "mxfp4_h16"), 3e-2)
GRADIENT |= dict.fromkeys(("quartet2", "averis", "ue5m3", "nvfp4_qk_mxfp8"), 3e-2)

_singles: dict[tuple, dict] = {}


def single(ranks: Ranks, overrides: list[str]) -> dict:
    """One process's reply, computed once."""
    key = (id(ranks), *overrides)
    if key not in _singles:
        _singles[key] = ranks.run("first_steps", overrides, size=1, steps=STEPS)
    return _singles[key]


def gradients(reply: dict) -> dict[str, torch.Tensor]:
    """Whole gradients of the first step by name, of all pipeline stages."""
    found: dict[str, torch.Tensor] = {}
    for file in sorted(Path(reply["out"]).glob("gradients_stage*.pt")):
        found |= torch.load(file)
    return found


def gradient_error(reply: dict, reference: dict) -> float:
    """Relative error of the first whole gradient, all parameters together."""
    mine, theirs = gradients(reply), gradients(reference)
    # A tied head on a stage of its own is a copy of the embedding, whose gradient holds both.
    names = theirs.keys()
    assert names <= mine.keys() <= names | {"output_layer.weight"}
    error = sum(float((mine[n] - theirs[n]).double().square().sum()) for n in names)
    return (error / sum(float(theirs[n].double().square().sum()) for n in names)) ** 0.5


def losses(reply: dict) -> list[float]:
    return [row["loss"] for row in reply["rows"]]


@dataclass(frozen=True)
class Difference:
    """Relative: of the first loss, the worst loss, the first whole gradient."""

    first: float
    later: float
    gradient: float

    def within(self, allowed: Difference) -> bool:
        return (
            self.first <= allowed.first
            and self.later <= allowed.later
            and self.gradient <= allowed.gradient
        )


def difference(reply: dict, reference: dict) -> Difference:
    gaps = [abs(a / b - 1) for a, b in zip(losses(reply), losses(reference), strict=True)]
    return Difference(gaps[0], max(gaps), gradient_error(reply, reference))


def allowed(recipe: str, *, splits_sums: bool) -> Difference:
    """The tolerances that are derived above."""
    gradient = GRADIENT[recipe.split()[0]] if splits_sums else SUM_ORDER
    return Difference(SAME_LOSS, LATER_LOSS, gradient)


def nudge(ranks: Ranks, overrides: list[str], reference: dict) -> float:
    """What the first gradient of one process makes of weights moved by about their last bit."""
    return gradient_error(ranks.run("nudged_steps", overrides, size=1), reference)


def other_sums(reference: dict, fp32_sums: dict) -> Difference:
    """What FP8 tensor cores make of a split k, from one process on them and one with FP32 sums.

    They hold about 14 bits of a sum, so where k is split y moves by 2^-12 and not by 2^-24, and casts make
    a step of their format of that: as much as from FP32 sums to theirs. A wrong scale of a few percent
    could hide in that; ``precision.backend=reference`` has nowhere to hide it. Where auto found no such
    cores both are the reference, and nothing is allowed for them.
    """
    found = difference(reference, fp32_sums)
    print(f"of other sums: first loss {found.first:.1e}, gradient {found.gradient:.1e}")
    return Difference(
        max(SAME_LOSS, 4 * found.first), LATER_LOSS, max(GRADIENT["fp8"], 2 * found.gradient)
    )


def agree(
    reply: dict,
    reference: dict,
    *,
    recipe: str,
    splits_sums: bool,
    allowing: Difference | None = None,
) -> None:
    """``allowing``: what the two may differ by, None: as said above."""
    if allowing is None:
        allowing = allowed(recipe, splits_sums=splits_sums)
    found = difference(reply, reference)
    print(
        f"{recipe}: first loss {found.first:.1e}, later {found.later:.1e}, "
        f"gradient {found.gradient:.1e}"
    )
    assert found.within(allowing), (found, allowing)
