"""The observer of casts: attached around a step, it sums what each cast did, and then gives the
statistics.

Two statistics need more than one cast:

- ``gradient_noise``: with x and dy as they were and as they were cast, the weight gradient dW of all
  microbatches and its error N by the two casts of wgrad. arXiv:2505.19115 finds that FP4 stops helping
  once |dW| < sqrt(3) |N|. The noise that dy brought along from later layers is not in N. It holds x and
  dy of a linear from its forward to its backward pass, and two matrices of the weight's size.
- ``oscillation``: how far each weight moved since the observations before, and how far its cast did
  (arXiv:2510.27527). A weight that swings around a rounding boundary moves little, its cast much. It
  holds four matrices of the weight's size, and begins anew every ``WINDOW`` observations and after a
  restart. Moves are those of the weights that GEMMs read (BF16, or FP32 with optim.params_dtype=fp32).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fp4pretrain.numerics import derive_key, spanning_amax
from fp4pretrain.observe import statistics as st
from fp4pretrain.ops.backend import Caster
from fp4pretrain.ops.casts import Cast
from fp4pretrain.ops.keys import Site
from fp4pretrain.ops.reference import ReferenceBackend, oriented
from fp4pretrain.ops.watching import Seen

WINDOW = 20
_FARTHER = 4.0
_REFERENCE = ReferenceBackend()
_DRAW = 3  # sets the draws of ``draws`` apart from those that are trained with


@dataclass
class _Path:
    """A weight and its cast at the last observation, and how far each element went so far."""

    weight: Tensor
    cast: Tensor
    weight_path: Tensor
    cast_path: Tensor
    seen: int = 1


class Watcher:
    """Shown casts between ``attach`` and ``detach`` of ``ops.watching``; ``collect`` ends a step.

    Args:
        sites: label -> site, the same on every rank.
        statistics: of ``statistics.STATISTICS``.
        draws: casts more for ``draws``, at least 2 where that is asked for.
    """

    def __init__(
        self, sites: Mapping[str, Site], statistics: Iterable[str], *, draws: int, device: Any
    ) -> None:
        self.labels = tuple(sites)
        self._index = {site: number for number, site in enumerate(sites.values())}
        self._wanted = frozenset(statistics)
        self._draws = draws if "draws" in self._wanted else 0
        self._device = device
        self._paths: dict[Site, _Path] = {}
        self.reset()

    def reset(self) -> None:
        """Forget an unfinished step."""
        shape = len(self.labels), st.LENGTH
        self._sums = torch.zeros(shape, dtype=torch.float64, device=self._device)
        self._largest = torch.zeros(len(self.labels), dtype=torch.float64, device=self._device)
        self._waiting: dict[tuple[int, int, str], deque[tuple[Tensor, Tensor]]] = {}
        self._gradients: dict[int, Tensor] = {}  # by site, [2, n, k]: dW and its error

    def forget(self) -> None:
        """Forget earlier observations too: the run went back."""
        self._paths.clear()
        self.reset()

    @torch.no_grad()
    def __call__(self, seen: Seen) -> None:
        """Add what the casts of a tensor did."""
        for cast, operand in zip(seen.casts, seen.operands, strict=True):
            site = cast.site
            number = None if site is None else self._index.get(site)
            paired = site is not None and self._owner(site) is not None
            if site is None or (number is None and not paired):
                continue
            x, y = oriented(seen.x, cast), operand.dequantize()
            if paired:
                self._pair(site, x, y)
            if number is None or not cast.spec.quantized:
                continue
            self._add(number, self._of_cast(seen, cast, x, y, number))
            if "oscillation" in self._wanted and (site.gemm, site.operand) == ("fprop", "w"):
                self._follow(number, site, x, y)

    def collect(self, data_group: dist.ProcessGroup | None = None) -> list[dict[str, Any]]:
        """One dict a site that was seen on any rank, with ``site`` and its numbers. Collective.

        ``data_group``: the ranks that hold the same weights and saw other sequences.
        """
        for number in range(len(self.labels)):
            found = self._gradients.get(number)
            if found is not None:
                if data_group is not None and data_group.size() > 1:
                    dist.all_reduce(found, group=data_group)
                gradient, noise = found.double().square().sum(dim=(1, 2))
                self._add(number, {"gradient": gradient, "noise": noise})
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(self._sums)
            dist.all_reduce(self._largest, op=dist.ReduceOp.MAX)
        sums, largest = self._sums.tolist(), self._largest.tolist()
        self.reset()
        rows = []
        for text, row, top in zip(self.labels, sums, largest, strict=True):
            told: dict[str, Any] = self._asked_for(st.numbers(row, top))
            if told and "scales" in self._wanted:
                told["scales"] = st.scale_shares(row)
            if told:
                rows.append({"site": text, **told})
        return rows

    def _asked_for(self, found: dict[str, float]) -> dict[str, float]:
        names = {"sqnr_db": "sqnr", "draw_bias": "draws", "draw_deviation": "draws"}
        names["gradient_to_noise"] = "gradient_noise"
        return {k: v for k, v in found.items() if names.get(k, k) in self._wanted}

    def _add(self, number: int, found: Mapping[str, Tensor]) -> None:
        for name, value in found.items():
            self._sums[number, st.AT[name]] += value

    def _of_cast(
        self, seen: Seen, cast: Cast, x: Tensor, y: Tensor, number: int
    ) -> dict[str, Tensor]:
        wanted = [*self._wanted]
        found = st.of_cast(x, y, wanted)
        self._largest[number] = torch.maximum(self._largest[number], x.abs().amax().double())
        blocks, octaves = st.of_blocks(x, cast.spec, _amax(x, cast, seen.caster), wanted)
        if octaves is not None:
            self._sums[number, len(st.SUMS) :] += octaves
        if "inexact" in self._wanted and type(seen.caster.backend) is not ReferenceBackend:
            reference = Caster(_REFERENCE, seen.caster.group, seen.caster.sites, record=False)
            (truth,) = reference.operands(seen.x, [cast])
            found["inexact"] = (truth.dequantize() != y).sum(dtype=torch.float64)
        if self._draws and cast.noise is not None:
            noise = cast.noise
            keys = [derive_key(noise.key, _DRAW, draw) for draw in range(self._draws)]
            casts = [cast.drawn(replace(noise, key=key), cast.signs) for key in keys]
            drawn = seen.caster.unrecorded().operands(seen.x, casts)
            found |= st.of_draws(x, [one.dequantize() for one in drawn])
        return found | blocks

    def _pair(self, site: Site, x: Tensor, y: Tensor) -> None:
        """Keep an operand of wgrad until its partner comes. Backward passes follow the order of the
        forward passes, so of several microbatches in flight the oldest is meant."""
        key = site.layer, site.linear
        self._waiting.setdefault((*key, site.operand), deque()).append((x, y))
        dys, xs = (self._waiting.get((*key, name)) for name in ("dy", "x"))
        if not dys or not xs:
            return
        (dy, dy_cast), (x, x_cast) = dys.popleft(), xs.popleft()
        gradient = dy.float() @ x.float().t()
        both = torch.stack([gradient, dy_cast.float() @ x_cast.float().t() - gradient])
        owner = self._owner(site)
        assert owner is not None
        known = self._gradients.get(owner)
        self._gradients[owner] = both if known is None else known.add_(both)

    def _owner(self, site: Site) -> int | None:
        """The observed site of wgrad that the gradient's numbers stand at; None where none is asked."""
        if site.gemm != "wgrad" or "gradient_noise" not in self._wanted:
            return None
        found = self._index.get(replace(site, operand="dy"))
        return self._index.get(replace(site, operand="x")) if found is None else found

    def _follow(self, number: int, site: Site, x: Tensor, y: Tensor) -> None:
        x, y = x.float().clone(), y.float().clone()
        path = self._paths.get(site)
        if path is None or path.seen >= WINDOW:
            self._paths[site] = _Path(x, y, torch.zeros_like(x), torch.zeros_like(y))
            return
        path.weight_path += (x - path.weight).abs_()
        path.cast_path += (y - path.cast).abs_()
        path.weight, path.cast, path.seen = x, y, path.seen + 1
        swings = path.cast_path > _FARTHER * path.weight_path
        count = torch.full_like(self._largest[0], float(x.numel()))
        self._add(number, {"weights": count, "oscillating": swings.sum(dtype=torch.float64)})


def _amax(x: Tensor, cast: Cast, caster: Caster) -> Tensor | None:
    """The outermost amaxes that x is scaled by: of the whole tensor, or of earlier steps."""
    amax = spanning_amax(x, cast.spec)
    if amax is None:
        return None
    if cast.shared and caster.group is not None:
        dist.all_reduce(amax, op=dist.ReduceOp.MAX, group=caster.group)
    if cast.spec.amax != "current" and caster.sites is not None:
        amax = caster.sites.used(cast, amax, record=False)
    return amax
