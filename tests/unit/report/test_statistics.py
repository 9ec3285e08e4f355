"""The statistics of compare on synthetic runs: coverage, power, verdicts, seeds needed, JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from report_lab import TOKENS, loss_at, write_fingerprint, write_run

from fp4pretrain import cli
from fp4pretrain.errors import UserError
from fp4pretrain.report import Options, as_json, compare, measure_noise, read_noise
from fp4pretrain.report.endpoint import Noise, diverged, measure
from fp4pretrain.report.equal_loss import equal_loss
from fp4pretrain.report.load import Curve, Run
from fp4pretrain.report.notes import notes
from fp4pretrain.report.student import (
    LEVEL,
    POWER,
    interval,
    pairs_needed,
    quantile,
    visible,
    visible_of_runs,
)

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A run of a recipe and seed; validation has half of ``gap``."""

    def one(recipe: str, seed: int, gap: float = 0.0, *, name: str = "", **how: Any) -> Path:
        precision = {"name": recipe, "fprop": {"x": {"format": recipe}}}
        path = tmp_path / (name or f"{recipe}-seed{seed}")
        return write_run(path, gap=gap, seed=seed, **{"precision": precision, **how})

    return one


def synthetic(tokens: np.ndarray, values: np.ndarray, **parts: Any) -> Run:
    """A run in memory that has validation losses only."""
    empty = Curve(np.zeros(0), np.zeros(0))
    return Run(
        name="run", path=Path(), config={}, plan=None, unigram_entropy=None, loss=empty,
        val_loss=Curve(tokens.astype(float), values.astype(float)), val_loss_bf16=empty,
        tokens_per_second=empty, val_parts={}, fingerprint=None, changes={}, events={}, **parts,
    )  # fmt: skip


# 95% bounds of Student's t in tables, which are 90% intervals on both sides
@pytest.mark.parametrize(
    ("freedom", "t"),
    [(1, 6.3138), (2, 2.9200), (5, 2.0150), (10, 1.8125), (30, 1.6973), (120, 1.6577)],
)
def test_quantiles_are_those_of_the_tables(freedom: int, t: float) -> None:
    assert quantile(freedom) == pytest.approx(t, abs=1e-4)


@pytest.mark.parametrize("pairs", [2, 3, 5])
def test_the_interval_holds_the_true_gap_in_nine_of_ten_comparisons(pairs: int) -> None:
    """Whole comparisons of runs whose seeds share noise, through ``measure``. 400 of them: the count is
    binomial with standard deviation 6, so four of them leave out one honest run in 10,000."""
    random = np.random.default_rng(pairs)
    tokens, repetitions, inside, gap = np.array([1, 2]), 400, 0, 0.02
    for _ in range(repetitions):
        found = []
        for common in random.normal(0, 0.01, size=pairs):  # of the seed: weights and order
            own = random.normal(0, 0.002, size=2)
            levels = 2.3 * (1 + common) * np.array([1 + gap, 1.0]) * (1 + own)
            found.append(tuple(synthetic(tokens, np.array([3.0, level])) for level in levels))
        seen = measure(found, "val_loss", window=1, noise=None)
        assert seen is not None and seen.relative is not None
        inside += seen.relative.low <= gap <= seen.relative.high
    deviation = math.sqrt(repetitions * LEVEL * (1 - LEVEL))
    assert abs(inside - LEVEL * repetitions) < 4 * deviation


@pytest.mark.parametrize("pairs", [2, 3, 6, 12])
def test_the_visible_gap_is_seen_in_eight_of_ten(pairs: int) -> None:
    """Student's test of drawn pairs: 20,000 draws have a standard deviation of 0.3%."""
    draws = np.random.default_rng(pairs).normal(visible(pairs), 1, size=(20_000, pairs))
    low = draws.mean(1) - quantile(pairs - 1) * draws.std(1, ddof=1) / math.sqrt(pairs)
    assert (low > 0).mean() == pytest.approx(POWER, abs=0.012)


def test_three_pairs_see_3_3_deviations_of_a_run_and_six_1_7() -> None:
    assert visible_of_runs(3) == pytest.approx(3.3, abs=0.06)
    assert visible_of_runs(6) == pytest.approx(1.7, abs=0.03)


def test_seeds_that_would_decide_it() -> None:
    """A gap that n pairs just see needs n; a smaller one more; one that needs too many, none."""
    for n in (2, 3, 6, 20):
        assert pairs_needed(visible(n) * 0.002 * 1.001, 0.002) == n
        assert pairs_needed(-visible(n) * 0.002 * 0.999, 0.002) == n + 1
    assert pairs_needed(0.00001, 0.002) is None
    assert interval([1.0]) is None
    assert interval([1.0, math.nan]) is None


@pytest.mark.parametrize(
    ("gaps", "verdict", "more"),
    [
        ((0.020, 0.024, 0.022), "behind", 0),
        ((-0.020, -0.024, -0.022), "ahead", 0),
        ((0.020, -0.010, 0.024), "undecided", 16),
        ((0.020, -0.0201, 0.0), "undecided", None),
    ],
)
def test_verdicts(
    make: Make, tmp_path: Path, gaps: tuple[float, ...], verdict: str, more: int | None
) -> None:
    runs = [make("bf16", seed) for seed in (1, 2, 3)]
    runs += [make("nvfp4", seed, gap) for seed, gap in enumerate(gaps, 1)]
    comparison = compare(runs, out=tmp_path / "out")
    found = comparison.results[1].gap
    assert found is not None
    assert found.verdict == verdict
    told = " ".join(notes(comparison))
    if more is None:
        assert "more than 100 seeds" in told
    else:
        assert found.more_seeds == more
        assert (f"about {more} more seeds" in told) == (more > 0)


def test_one_pair_has_an_interval_of_the_text_and_decides_nothing(
    make: Make, tmp_path: Path
) -> None:
    """Parts of the validation set that differ alike in both runs are no noise of the gap."""
    random = np.random.default_rng(0)
    shared, own = random.normal(0, 0.5, 32), random.normal(0, 0.001, 32)
    own -= own.mean()
    runs = [
        make("bf16", 1, parts=list(shared - shared.mean())),
        make("nvfp4", 1, 0.02, parts=list(shared - shared.mean() + own)),
    ]
    found = compare(runs, out=tmp_path / "out").results[1].gap
    assert found is not None and found.absolute is not None and found.relative is not None
    assert found.absolute.half == pytest.approx(quantile(31) * own.std(ddof=1) / math.sqrt(32))
    assert found.relative.low > 0
    assert (found.source, found.verdict, found.more_seeds) == ("text", "undecided", None)


def test_measured_noise_decides_one_pair_or_says_how_many_it_takes(
    make: Make, tmp_path: Path
) -> None:
    runs = [make("bf16", 1), make("nvfp4", 1, 0.04)]  # 2% in validation
    for deviation, verdict, more in ((0.001, "behind", 0), (0.02, "undecided", 13)):
        options = Options(noise=Noise(deviation, 2))
        found = compare(runs, out=tmp_path / "out", options=options).results[1].gap
        assert found is not None and found.relative is not None
        assert found.relative.half == pytest.approx(math.sqrt(2) * deviation * quantile(2))
        assert (found.source, found.verdict, found.more_seeds) == ("noise", verdict, more)


def test_noise_is_the_deviation_of_replicates(make: Make, tmp_path: Path) -> None:
    """And the largest kind of it is what gaps are held against."""
    runs = [make("bf16", 1, level, name=f"r{n}") for n, level in enumerate((0, 0.004, 0.02, 0.03))]
    found = measure_noise({"sums": runs[:2], "weights": [runs[0], *runs[2:]]})
    assert found["levels"][0]["deviation"] == pytest.approx(0.002 / math.sqrt(2) / 1.001)
    losses = np.array([1, 1.01, 1.015]) * (loss_at(200 * TOKENS) + 0.1)
    assert found["levels"][1]["nats"] == pytest.approx(losses.std(ddof=1))
    assert found["deviation"] == found["levels"][1]["deviation"]
    three = next(one["gap"] for one in found["visible"] if one["pairs"] == 3)
    assert three == pytest.approx(visible_of_runs(3) * found["deviation"])
    file = tmp_path / "noise.json"
    file.write_text(json.dumps(found))
    assert read_noise(file) == Noise(found["deviation"], 2)
    file.write_text("{}")
    with pytest.raises(UserError, match=r"^noise: .*is not what fp4pretrain noise wrote"):
        read_noise(file)


@pytest.mark.parametrize("extra", [0.15, -0.1])
def test_tokens_to_equal_loss_are_those_put_in(extra: float) -> None:
    """A recipe that needs 15% more tokens for every loss, on a curve that is no line."""
    tokens = np.arange(40, 1041, 40)

    def loss(t: Any) -> Any:
        return 2 + 30 / np.sqrt(t)

    base, run = synthetic(tokens, loss(tokens)), synthetic(tokens, loss(tokens / (1 + extra)))
    found = equal_loss([(run, base), (run, base)])
    assert found.extra == pytest.approx(extra, abs=0.001)
    assert found.interval is not None
    assert found.interval.half == pytest.approx(0, abs=1e-9)


def test_tokens_to_equal_loss_that_cannot_be_read_say_why() -> None:
    far, near = np.array([500, 1000]), np.arange(100, 1001, 100)
    cases = [
        (far, [3.0, 2.0], [3.1, 2.2], "too far apart"),
        (near, np.linspace(3, 2, 10), np.linspace(5, 4, 10), "before the first evaluation"),
        (near, np.linspace(3, 2, 10), [math.nan] * 10, "diverged"),
    ]
    for tokens, base, run, why in cases:
        pair = (synthetic(tokens, np.array(run)), synthetic(tokens, np.array(base)))
        found = equal_loss([pair])
        assert found.extra is None
        assert why in str(found.why)


def test_a_short_run_of_noisy_batches_has_not_diverged() -> None:
    """Batches that differ by 8% about a falling loss; and the same run that rises again by a third."""
    steps, noise = np.arange(1.0, 31.0), np.random.default_rng(0).normal(size=(50, 30))

    def called(loss: Any) -> int:
        runs = [replace(synthetic(steps, row), loss=Curve(steps, row)) for row in loss]
        return sum(diverged(run, None, window=3) for run in runs)

    falling = (2.5 + 3 * np.exp(-steps / 5)) * (1 + 0.08 * noise)
    assert called(falling) <= 1
    assert called(falling * np.where(steps > 22, 1.35, 1.0)) >= 49


@pytest.mark.parametrize(
    ("levels", "best", "edge"),
    [((0.04, 0.0, 0.03), 1e-3, None), ((0.0, 0.02, 0.05), 5e-4, "lowest")],
)
def test_each_recipe_is_compared_at_its_best_learning_rate(
    make: Make, tmp_path: Path, levels: tuple[float, ...], best: float, edge: str | None
) -> None:
    runs = []
    for recipe, own in (("bf16", (0.02, 0.0, 0.02)), ("nvfp4", levels)):
        for rate, level in zip((5e-4, 1e-3, 2e-3), own, strict=True):
            for seed in (1, 2):
                gap = level + (0.05 if recipe == "nvfp4" else 0) + seed / 1000
                optim = {"eps": 1e-8, "lr": rate}
                runs.append(make(recipe, seed, gap, name=f"{recipe}-{rate}-{seed}", optim=optim))
    comparison = compare(runs, out=tmp_path / "out")
    result = comparison.results[1]
    assert len(comparison.results) == 2
    found = comparison.tuning[result.run.name]
    assert (found.best, found.edge) == (best, edge)
    assert found.rates == (5e-4, 1e-3, 2e-3)
    assert result.gap is not None
    assert result.gap.gap == pytest.approx(0.025, abs=1e-4)
    assert ("AT THE EDGE" in " ".join(notes(comparison))) == (edge is not None)
    if edge is None:
        assert found.lowest is not None  # the parabola through 0.04, 0, 0.03, in steps of log 2
        step = (0.04 - 0.03) / 2 / (0.04 + 0.03)
        assert found.lowest[0] == pytest.approx(1e-3 * 2**step, rel=1e-6)
        assert found.lowest[1] < found.losses[1]
    else:
        assert found.lowest is None


def test_rates_that_were_not_swept_are_no_tuning(make: Make, tmp_path: Path) -> None:
    runs = [make("bf16", 1), make("nvfp4", 1, optim={"eps": 1e-8, "lr": 2e-3})]
    with pytest.raises(UserError, match=r"optim\.lr \(0\.002 against 0\.001\)"):
        compare(runs, out=tmp_path / "out")


def test_runs_with_other_validation_sets_are_refused(make: Make, tmp_path: Path) -> None:
    runs = [make("bf16", 1), make("nvfp4", 1)]
    for run, digest in zip(runs, "vw", strict=True):
        write_fingerprint(run, validation=digest)
    with pytest.raises(UserError, match="different validation sets") as refused:
        compare(runs, out=tmp_path / "out")
    assert "\n" not in str(refused.value)
    write_fingerprint(runs[1], order="another text")
    with pytest.raises(UserError, match=r"more than the recipe: data\.order"):
        compare(runs, out=tmp_path / "out")
    write_fingerprint(runs[1])
    compare(runs, out=tmp_path / "out")


def test_the_plan_decides_what_one_recipe_is(make: Make, tmp_path: Path) -> None:
    """Two spellings of one plan are seeds of one recipe; where a plan is another, so is the recipe."""
    runs = [make("bf16", 1), make("bf16", 2)]
    spelled = {"name": "mine", "fprop": {"x": {"format": "nvfp4"}}, "keep": {"last_blocks": 0.13}}
    runs += [make("nvfp4", 1), make("nvfp4", 2, precision=spelled)]
    for run in runs:
        write_fingerprint(run, plan=run.name.split("-")[0])
    assert compare(runs, out=tmp_path / "out").results[1].seeds == (1, 2)
    write_fingerprint(runs[3], plan="another")
    assert len(compare(runs, out=tmp_path / "out").results) == 3


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ("optim.lr: 0.001 -> 0.0005, precision.fprop.x.format: nvfp4 -> bf16", True),
        ("precision.fprop.x.format: nvfp4 -> bf16", False),
        ("train.steps: 100 -> 200, optim.decay: 20 -> 40", False),
    ],
)
def test_a_run_resumed_as_another_experiment_is_known(
    make: Make, tmp_path: Path, changes: str, refused: bool
) -> None:
    runs = [make("bf16", 1), make("nvfp4", 1), make("nvfp4", 2), make("bf16", 2)]
    starts = [{"step": 0, "changes": ""}, {"step": 50, "changes": changes}]
    (runs[2] / "history.json").write_text(json.dumps({"saved_step": 50, "starts": starts}))
    if refused:
        with pytest.raises(UserError, match=r"resumed as another experiment \(optim.lr: 0.001"):
            compare(runs, out=tmp_path / "out")
    comparison = compare(runs, out=tmp_path / "out", options=Options(force=refused))
    hybrid = "train.steps" not in changes
    assert len(comparison.results) == (3 if hybrid else 2)  # never pooled with what it was
    told = [note for note in notes(comparison) if "was resumed as another experiment" in note]
    assert len(told) == hybrid


def test_files_are_passed_over_and_what_is_no_run_is_named(make: Make, tmp_path: Path) -> None:
    """A second ``compare runs/*`` finds the page and the picture of the first."""
    runs = [make("bf16", 1), make("nvfp4", 1), make("fp8", 1)]
    options = Options(html=True)
    first = compare(sorted(tmp_path.iterdir()), out=tmp_path, baseline=runs[0], options=options)
    assert len(first.results) == 3
    (tmp_path / "bench").mkdir()
    rows = (runs[2] / "metrics.jsonl").read_text()
    (runs[2] / "metrics.jsonl").write_text(rows.replace('"tokens"', '"token"'))
    second = compare(sorted(tmp_path.iterdir()), out=tmp_path, baseline=runs[0], options=options)
    assert [result.run.name for result in second.results] == ["bf16-seed1", "nvfp4-seed1"]
    told = " ".join(notes(second))
    assert "fp8-seed1/metrics.jsonl: rows without tokens" in told
    assert "bench: no metrics.jsonl" in told
    with pytest.raises(UserError, match="rows without tokens"):
        compare([runs[0], runs[2]], out=tmp_path)
    with pytest.raises(UserError, match="rows without tokens"):
        compare(runs[:2], out=tmp_path, baseline=runs[2])


def test_json_is_all_that_stands_on_standard_output(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipes = {"bf16": 0.0, "nvfp4": 0.03, "fp8": 0.0}
    runs = [
        make(recipe, seed, gap * (1 + seed / 1e3))
        for recipe, gap in recipes.items()
        for seed in (1, 2, 3)
    ]
    arguments = ["compare", *map(str, runs), "--baseline", str(runs[0]), "--json"]
    cli.main([*arguments, "--out", str(tmp_path / "out")])
    found = json.loads(capsys.readouterr().out)
    assert found["baseline"] == "bf16"
    nvfp4, fp8 = found["results"]
    assert {
        "name",
        "seeds",
        "gap",
        "low",
        "high",
        "verdict",
        "tokens_to_equal_loss",
    } <= nvfp4.keys()
    assert (nvfp4["name"], nvfp4["seeds"], nvfp4["verdict"]) == ("nvfp4", [1, 2, 3], "behind")
    assert nvfp4["gap"] == pytest.approx(0.01503)
    assert nvfp4["low"] < nvfp4["gap"] < nvfp4["high"]
    assert nvfp4["nats_low"] < nvfp4["nats"] < nvfp4["nats_high"]
    assert nvfp4["endpoints"].keys() == {"val_loss", "loss"}
    assert (fp8["gap"], fp8["verdict"]) == (0, "undecided")


def test_a_diverged_run_is_null_in_json(make: Make, tmp_path: Path) -> None:
    runs = [make("bf16", 1), make("nvfp4", 1, rows={"loss": "NaN"}, every=1000)]
    text = json.dumps(as_json(compare(runs, out=tmp_path / "out")), allow_nan=False)
    (result,) = json.loads(text)["results"]
    assert (result["gap"], result["low"], result["verdict"]) == (None, None, "undecided")
    assert result["diverged"] == ["nvfp4-seed1"]
