"""Every ``observe.interval`` steps: what each selected cast did in that step, as one row.

The row holds means over layers and linears as flat numbers (``observe/sqnr_db/wgrad.dy``), the site with
the worst SQNR, and under ``observed`` everything: ``sites``, a list for each statistic in their order
(null where a site has none), and ``scales``, the shares of blocks by the octave of their scale.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from megatron.core import parallel_state

from fp4pretrain.observe.sites import selection_of
from fp4pretrain.observe.watcher import Watcher
from fp4pretrain.ops import watching
from fp4pretrain.train.hooks.logging import Logging
from fp4pretrain.train.loop import Hook
from fp4pretrain.train.trainer import Trainer

EVENT = "observe"
_DIGITS = 4


class Observing(Hook):
    """Attaches a watcher around each observed step and logs its numbers. Evaluations are not seen."""

    def __init__(self, trainer: Trainer, logging: Logging) -> None:
        section = trainer.config.observe
        self._interval = section.interval
        self._logging = logging
        self._watching = False
        self._watcher = Watcher(
            selection_of(section).sites(trainer.binding.plan),
            section.statistics,
            draws=section.draws,
            device=trainer.world.device,
        )

    def before_step(self, trainer: Trainer) -> None:
        if (trainer.step + 1) % self._interval == 0:
            trainer.clock.weights_changed()  # their casts may be those that an evaluation left
            watching.attach(self._watcher)
            self._watching = True

    def only_reads(self, trainer: Trainer, step: int) -> bool:
        return step % self._interval != 0 and (step + 1) % self._interval != 0

    def after_step(self, trainer: Trainer, row: dict[str, Any]) -> None:
        if not self._watching:
            return
        self._detach()
        with self._logging.throughput.paused():
            found = self._watcher.collect(parallel_state.get_data_parallel_group())
        self._logging.write(
            {"event": EVENT, "step": trainer.step, "tokens": trainer.tokens, **told(found)}
        )

    def after_rollback(self, trainer: Trainer) -> None:
        self._detach()
        self._watcher.forget()

    def close(self) -> None:
        self._detach()

    def _detach(self) -> None:
        if self._watching:
            watching.detach()
            self._watching = False


def told(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The numbers of the sites as the fields of a row, to four digits."""
    names = list(
        dict.fromkeys(key for one in found for key in one if key not in ("site", "scales"))
    )
    row: dict[str, Any] = {}
    for name in names:
        by_operand: dict[str, list[float]] = {}
        for one in found:
            if name in one:
                by_operand.setdefault(operand_of(one["site"]), []).append(one[name])
        for operand, values in by_operand.items():
            row[f"{EVENT}/{name}/{operand}"] = _short(statistics.fmean(values))
    worst = min(
        (one for one in found if "sqnr_db" in one), key=lambda o: o["sqnr_db"], default=None
    )
    if worst is not None:
        row["worst"] = f"{worst['site']} {worst['sqnr_db']:.1f} dB"
    everything: dict[str, Any] = {"sites": [one["site"] for one in found]}
    everything |= {n: [_short(o[n]) if n in o else None for o in found] for n in names}
    if any("scales" in one for one in found):
        everything["scales"] = [
            {octave: _short(share) for octave, share in one.get("scales", {}).items()}
            for one in found
        ]
    return {**row, "observed": everything}


def operand_of(site: str) -> str:
    """``wgrad.dy`` of ``3.fc2.wgrad.dy``."""
    return ".".join(site.split(".")[-2:])


def _short(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
