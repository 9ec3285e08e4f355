"""Amaxes that outlive a step: fixed ones, ones sampled now and then and held, and histories.

A cast by ``amax: current`` measures its tensor and forgets. The others ask an ``SiteState``, which
belongs to a model, and leave with it what they measured:

    amax       the scale of step s is made from                                    source
    fixed      ``amax_value``, whatever the tensor holds                           arXiv:2605.06067
    held       the tensor where s is a multiple of ``amax_steps``; until the       arXiv:2609.02846
               next such step the largest that was measured in that one
    delayed    the largest of the ``amax_steps`` steps before s                    arXiv:2209.05433

What is measured is the largest over all microbatches and ranks of a step, so every layout makes the
same scales. A site without a past (the first step, a rule that has just begun) measures. The state is
part of a checkpoint. Beside them stand counts: how often each site was cast and multiplied while
training, by format, which the audit holds against the plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fp4pretrain.ops.casts import Cast
from fp4pretrain.ops.keys import Site


class SiteState:
    """What casts leave behind at their sites: amaxes for later steps, and counts.

    ``cast``: (site, format) -> casts made; ``multiplied``: (site of the first operand, formats of both)
    -> products made; since this process started, of this rank, while ``recording``.

    Args:
        sites: every site of the whole model that any recipe of the plan casts by ``held`` or
            ``delayed``, the same list on every rank, with the number of steps it remembers.
    """

    def __init__(self, sites: Mapping[Site, int], device: torch.device) -> None:
        self.step = 0
        self.recording = True  # off while evaluating
        self.cast: Counter[tuple[Site | None, str]] = Counter()
        self.multiplied: Counter[tuple[Site | None, str, str]] = Counter()
        self._row = {site: row for row, site in enumerate(sites)}
        depth = max(sites.values(), default=0)
        self._past = torch.zeros(len(sites), depth, device=device)
        self._now = torch.zeros(len(sites), device=device)

    def __len__(self) -> int:
        return len(self._row)

    def used(self, cast: Cast, measured: Tensor, *, record: bool) -> Tensor:
        """The amax that a cast's scale is made from: an fp32 scalar.

        Args:
            measured: fp32 scalar, the largest magnitude of the whole tensor.
            record: remember it for later steps (not while evaluating).
        """
        spec = cast.spec
        if spec.amax == "current":
            return measured
        if spec.amax == "fixed":
            return torch.full_like(measured, spec.amax_value)
        assert cast.site is not None
        row = self._row[cast.site]
        samples = spec.amax == "delayed" or self.step % spec.amax_steps == 0
        if record and samples:
            finite = torch.where(measured.isfinite(), measured, 0.0)
            self._now[row] = torch.maximum(self._now[row], finite.reshape(()))
        if spec.amax == "held" and samples:
            return measured
        kept = 1 if spec.amax == "held" else spec.amax_steps
        past = self._past[row, :kept].max()
        return torch.where(past > 0, past, measured.reshape(())).reshape(measured.shape)

    def finish_step(self, step: int) -> None:
        """Called on every rank after a step: what was measured becomes the past. ``step``: the next."""
        self.step = step
        if not self._row:
            return
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._now, op=dist.ReduceOp.MAX)
        moved = torch.roll(self._past, 1, dims=1)
        moved[:, 0] = self._now
        # a site that measured nothing in this step keeps what it had
        # (in place: a captured step reads this memory)
        self._past.copy_(torch.where((self._now > 0)[:, None], moved, self._past))
        self._now.zero_()

    def state(self) -> dict[str, list[float]]:
        """Histories by site, newest first, as JSON values. Waits for the device."""
        past = self._past.tolist()
        return {_name(site): past[row] for site, row in self._row.items() if any(past[row])}

    def restore(self, state: Mapping[str, Iterable[float]], step: int) -> None:
        """Go on from what ``state`` gave, at the start of ``step``; sites it does not name begin anew."""
        self.step = step
        self._past.zero_()
        self._now.zero_()
        for site, row in self._row.items():
            past = list(state.get(_name(site), ()))[: self._past.shape[1]]
            self._past[row, : len(past)] = torch.tensor(past, device=self._past.device)


def sites_of(recipes: Mapping[tuple[int, int], Iterable[Any]]) -> dict[Site, int]:
    """Site -> steps it remembers, of all casts by ``held`` or ``delayed``.

    ``recipes``: (layer, linear) as in ``Site`` -> every recipe that the linear can ever follow.
    """
    found: dict[Site, int] = {}
    for (layer, linear), choices in recipes.items():
        for recipe in choices:
            for gemm, operand, spec in recipe.operands():
                if spec.amax in ("held", "delayed"):
                    site = Site(layer, linear, gemm, operand)
                    steps = 1 if spec.amax == "held" else spec.amax_steps
                    found[site] = max(steps, found.get(site, 0))
    return found


def _name(site: Site) -> str:
    return f"{site.layer}.{site.linear}.{site.gemm}.{site.operand}"
