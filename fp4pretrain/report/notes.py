"""The sentences below a comparison's table: how its numbers were made, and what to hold against them."""

from __future__ import annotations

from collections.abc import Iterator

from fp4pretrain.report.comparison import Comparison, Result
from fp4pretrain.report.student import MANY
from fp4pretrain.report.tuning import Tuning

_SOURCES = {
    "seeds": "over pairs of runs of one seed (Student's t)",
    "noise": "from the noise that was measured before, of a single pair",
    "text": "within the run: it covers which text was held out and not the seed's noise, so one "
    "seed decides nothing",
}


def notes(comparison: Comparison) -> list[str]:
    """One sentence each."""
    return [
        *_how(comparison),
        *(note for result in comparison.results[1:] for note in _about(result)),
        *map(_tuning, comparison.tuning.values()),
        *comparison.remarks,
        *_against(comparison),
    ]


def _how(comparison: Comparison) -> Iterator[str]:
    results = comparison.results
    judged = "validation" if any("val_loss" in one.gaps for one in results) else "training"
    text = f"Gap: last {judged} loss against {comparison.baseline.run.name} at the same tokens."
    if judged == "training":
        text += f" Training loss: mean of the last {comparison.averaged} logged rows."
    if any("val_loss_bf16" in one.gaps for one in results):
        text += " BF16 gap: the same weights with all linears in BF16."
    yield text
    sources = {one.gap.source for one in results if one.gap is not None and one.gap.source}
    for source in sorted(sources):
        yield f"± is half of the 90% interval {_SOURCES[source]}."
    if any(one.equal_loss and one.equal_loss.extra is not None for one in results):
        yield "Extra tokens: to reach the other's last validation loss, read from these curves."


def _about(result: Result) -> Iterator[str]:
    gap, name = result.gap, result.name
    if result.diverged:
        yield f"DIVERGED: {', '.join(result.diverged)}."
    if gap is not None and gap.verdict == "undecided" and not result.diverged:
        if gap.more_seeds:
            yield (
                f"{name}: undecided; about {gap.more_seeds} more seeds would see a gap of "
                f"{100 * gap.gap:+.2f}% (80% power)."
            )
        elif gap.hopeless:
            yield f"{name}: undecided; it would take more than {MANY} seeds to see this gap."
        else:
            yield (
                f"{name}: undecided; one pair shows no spread over seeds: add two seeds, or give "
                "--noise what fp4pretrain noise measured."
            )
    if result.equal_loss is not None and result.equal_loss.why is not None:
        yield f"{name}: tokens to equal loss cannot be read: {result.equal_loss.why}."


def _tuning(found: Tuning) -> str:
    told = ", ".join(
        f"{rate:g}: {loss:.4f}" for rate, loss in zip(found.rates, found.losses, strict=True)
    )
    text = f"{found.name}: best of optim.lr ({told}) is {found.best:g}"
    if found.edge is not None:
        return f"{text}, the {found.edge} tried: AT THE EDGE, try beyond it."
    if found.lowest is None:
        return f"{text}."
    return f"{text}; a parabola has its lowest loss {found.lowest[1]:.4f} at {found.lowest[0]:.3g}."


def _against(comparison: Comparison) -> Iterator[str]:
    if comparison.common_tokens is None:
        yield "Runs end at different tokens: each gap is taken where its run ends."
    unequal = sorted({one.key for one in comparison.differences if not one.harmless})
    if unequal:
        yield f"FORCED: the runs also differ in {', '.join(unequal)}."
    for run in (result.run for result in comparison.results):
        if run.changes:
            told = ", ".join(f"{key}: {change}" for key, change in run.changes.items())
            yield f"{run.name} was resumed as another experiment: {told}."
        if run.events:
            told = ", ".join(f"{count} x {event}" for event, count in run.events.items())
            yield f"What happened to {run.name}: {told}."
    if comparison.unigram_entropy is not None:
        yield f"Unigram entropy of the data: {comparison.unigram_entropy:.4f} nats."
