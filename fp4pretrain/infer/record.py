"""What an evaluation found, in the run's own record: a row of metrics.jsonl, wandb's summary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from fp4pretrain.observe import JsonlSink, WandbSink, stored_run_id
from fp4pretrain.train.lock import RunLock
from fp4pretrain.train.run_dir import METRICS
from fp4pretrain.train.stored import StoredRun

_NOTHING_CUT = 2**62


def record(run: StoredRun, values: Mapping[str, float]) -> None:
    """Append ``{"event": "evaluated", "step", "tokens", "eval/NAME": value, ...}`` to the run's rows, and
    put the values into the summary of its wandb run, where it has one.

    Raises UserError where the run is being trained at this moment.
    """
    named = {f"eval/{name}": value for name, value in values.items()}
    lock = RunLock(run.folder)
    lock.acquire()
    try:
        sink = JsonlSink(run.folder / METRICS, resume_step=_NOTHING_CUT)
        sink.write({"event": "evaluated", "step": run.step, "tokens": run.tokens, **named})
        sink.close()
        known, w = stored_run_id(run.folder), run.config.logging.wandb
        if known is not None and w.mode != "disabled":
            # the wandb run has its tags already, those of the recipe among them
            wandb = WandbSink({}, run.folder, replace(w, tags=[]), resume_id=known)
            wandb.summarize(named)
            wandb.close()
    finally:
        lock.release()
