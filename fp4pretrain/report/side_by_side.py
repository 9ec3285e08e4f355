"""Tables of runs side by side: a row a fact, a column a run, and only differences are marked."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from fp4pretrain.config import RunConfig, plan_of
from fp4pretrain.costs import flop_shares
from fp4pretrain.errors import UserError
from fp4pretrain.naming import flat
from fp4pretrain.precision import GEMMS, OPERANDS, Plan
from fp4pretrain.report.comparison import Comparison, Result, tokens_text
from fp4pretrain.report.load import Run
from fp4pretrain.stored import config_from

_NO = "-"
# Keys about a run's place and its logging, which do not change what it computes.
_NOT_SHOWN = ("name", "run_dir", "logging", "resume", "resume_with", "baseline", "precision")


@dataclass(frozen=True)
class Table:
    """``rows``: a name and a cell for each run, in the order of ``columns``."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]


def recipes(comparison: Comparison) -> Table:
    """The six casts, the rotations, what is kept in BF16 and the rules of each recipe."""
    plans = [_plan(result.run) for result in comparison.results]
    rows: list[tuple[str, tuple[str, ...]]] = []
    for gemm in GEMMS:
        for operand in OPERANDS[gemm]:
            rows.append((f"{gemm} {operand}", _each(plans, _cast_text(gemm, operand))))
        rows.append((f"{gemm} rotation", _each(plans, _rotation_text(gemm))))
    rows.append(("linears quantized", _each(plans, _quantized)))
    rows.append(("rules", _each(plans, _rules)))
    return Table(tuple(one.run.name for one in comparison.results), tuple(rows))


def configs(comparison: Comparison) -> Table:
    """The keys, recipe and names left out, on which any two of the runs differ."""
    trees = [flat(result.run.config) for result in comparison.results]
    keys = sorted({key for tree in trees for key in tree})
    rows = []
    for key in keys:
        if any(key == one or key.startswith(f"{one}.") for one in _NOT_SHOWN):
            continue
        cells = tuple(_text(tree.get(key, _NO)) for tree in trees)
        if len(set(cells)) > 1:
            rows.append((key, cells))
    return Table(tuple(one.run.name for one in comparison.results), tuple(rows))


def facts(comparison: Comparison) -> Table:
    """What each run is, what it ran on, how far it is, and what it costs."""
    results = comparison.results
    rows: dict[str, Callable[[Result], str]] = {
        "state": lambda one: state(one.run),
        "model": lambda one: _model(one.run),
        "data": lambda one: _data(one.run),
        "tokens": lambda one: tokens_text(one.run.loss.tokens[-1]),
        "hardware": lambda one: _start(one.run, "devices", _devices),
        "commit": lambda one: _start(one.run, "commit", lambda commit: str(commit)[:10]),
        "duration": lambda one: _duration(one.run),
        "tokens/s": lambda one: (
            _NO if one.tokens_per_second is None else f"{one.tokens_per_second:,.0f}"
        ),
        "FLOPs": lambda one: _flops(one.run),
    }
    return Table(
        tuple(one.run.name for one in results),
        tuple((name, tuple(tell(one) for one in results)) for name, tell in rows.items()),
    )


def state(run: Run) -> str:
    """Finished; or how far the run came, and when it wrote its last row."""
    step, when = run.last
    if run.steps is None or step >= run.steps:
        return "finished"
    ago = "" if when is None else f", last row {_span(max(0.0, time.time() - when))} ago"
    return f"step {step} of {run.steps}{ago}"


def _plan(run: Run) -> tuple[RunConfig, Plan] | None:
    """None for a run of a version whose config this one cannot read."""
    sections = {name: run.config[name] for name in ("model", "precision") if name in run.config}
    return _plan_of(json.dumps(sections, sort_keys=True, default=str))


@lru_cache(maxsize=1024)
def _plan_of(sections: str) -> tuple[RunConfig, Plan] | None:
    """Of the JSON of a config's sections ``model`` and ``precision``, which runs of many seeds share."""
    try:
        config = config_from(json.loads(sections), "config.yaml")
        return config, plan_of(config)
    except UserError:
        return None


def _each(
    plans: Sequence[tuple[RunConfig, Plan] | None], tell: Callable[[Plan], str]
) -> tuple[str, ...]:
    return tuple("?" if one is None else tell(one[1]) for one in plans)


def _cast_text(gemm: str, operand: str) -> Callable[[Plan], str]:
    def tell(plan: Plan) -> str:
        row = next(r for r in plan.recipe.rows() if r[:2] == (gemm, operand))
        _, _, name, block, rounding, scale, _ = row
        said = [name, block, "" if rounding == "nearest" else rounding]
        said.append("" if scale in ("default", "-") else scale)
        return " ".join(part for part in said if part not in ("", "-"))

    return tell


def _rotation_text(gemm: str) -> Callable[[Plan], str]:
    return lambda plan: str(plan.recipe.gemm(gemm).rotation)


def _quantized(plan: Plan) -> str:
    linears = [place for place in plan.linears() if place[0] is not None]
    count = sum(plan.recipes_of(*place)[0].quantized for place in linears)
    return f"{count} of {len(linears)}"


def _rules(plan: Plan) -> str:
    return "; ".join(f"{rule.name}: {rule.where_and_when()}" for rule in plan.ordered) or _NO


def _model(run: Run) -> str:
    model = run.config.get("model")
    if not isinstance(model, Mapping):
        return _NO
    sizes = {"layers": "num_layers", "d": "hidden_size", "ffn": "ffn_hidden_size"}
    sizes |= {"heads": "num_attention_heads", "seq": "seq_length", "vocabulary": "vocab_size"}
    return ", ".join(f"{name} {model[key]}" for name, key in sizes.items() if key in model)


def _data(run: Run) -> str:
    data = run.config.get("data")
    if not isinstance(data, Mapping):
        return _NO
    if data.get("mock"):
        return "mock"
    path = data.get("path")
    named = "standard library" if path is None else _text(path)
    return f"{named}, {data.get('tokenizer')} tokens"


def _devices(found: Mapping[str, int]) -> str:
    return ", ".join(f"{count} x {name}" for name, count in found.items())


def _start(run: Run, key: str, tell: Callable[[Any], str]) -> str:
    found = [start[key] for start in run.starts if start.get(key)]
    return " / ".join(dict.fromkeys(tell(one) for one in found)) or _NO


def _duration(run: Run) -> str:
    begun = [start["time"] for start in run.starts if "time" in start]
    if not begun or run.last[1] is None:
        return _NO
    again = f", {len(run.starts)} starts" if len(run.starts) > 1 else ""
    return _span(run.last[1] - begun[0]) + again


def _span(seconds: float) -> str:
    """3 s, 12 min, 4.2 h, 3.1 d."""
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.0f} s"


def _flops(run: Run) -> str:
    found = _plan(run)
    if found is None:
        return _NO
    shares = flop_shares(found[1], found[0].model)
    return ", ".join(f"{100 * share:.0f}% {name}" for name, share in shares.items() if share)


def _text(value: Any) -> str:
    return "null" if value is None else str(value)
