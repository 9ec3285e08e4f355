"""Runs that differ in their seed alone are one result, with the standard error of its gap."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from report_lab import STEPS, TOKENS, loss_at, write_run
from rich.console import Console

from fp4pretrain.errors import UserError
from fp4pretrain.report import compare
from fp4pretrain.report.picture import _gap_curve

Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """A run of a recipe and seed, whose loss is ``1 + level`` times the closed form."""

    def one(recipe: str, seed: int, level: float = 0.0, **how: Any) -> Path:
        precision = {"name": recipe, "fprop": {"x": {"format": recipe}}}
        path = tmp_path / f"{recipe}-seed{seed}"
        return write_run(path, gap=level, seed=seed, precision=precision, **how)

    return one


def six(make: Make) -> tuple[list[Path], list[float]]:
    """Three seeds of two recipes: seeds move both by per cents, the recipe by 2, 5 and 2%."""
    levels = (0.0, 0.10, -0.05)
    gaps = (0.02, 0.05, 0.02)
    base = [make("fp8", seed, level) for seed, level in enumerate(levels, 1)]
    runs = [
        make("nvfp4", seed, (1 + level) * (1 + gap) - 1)
        for seed, (level, gap) in enumerate(zip(levels, gaps, strict=True), 1)
    ]
    return [base[0], runs[2], base[1], runs[0], base[2], runs[1]], list(gaps)


def test_means_and_the_error_of_the_pairs(make: Make, tmp_path: Path) -> None:
    runs, gaps = six(make)
    base, result = compare(runs, out=tmp_path / "out").results
    assert (base.run.name, result.run.name) == ("fp8 (3 seeds)", "nvfp4 (3 seeds)")
    assert (base.seeds, result.seeds) == (("1", "2", "3"), ("3", "1", "2"))
    mean = sum((1, 1.10, 0.95)) / 3
    assert base.loss.loss == pytest.approx(loss_at((STEPS - 9.5) * TOKENS) * mean)
    ratio = sum((1.02, 1.10 * 1.05, 0.95 * 1.02)) / sum((1, 1.10, 0.95))
    assert result.loss.gap == pytest.approx(ratio - 1)
    # 2, 5 and 2%: standard deviation sqrt(3)%, over sqrt(3) seeds
    assert result.loss.error == pytest.approx(0.01)
    assert result.band is not None
    assert result.band == pytest.approx([0.01] * STEPS)
    # validation has half of a run's level, so its pairs differ by other gaps
    halves = [(1 + ((1 + v) * (1 + g) - 1) / 2) / (1 + v / 2) - 1
              for v, g in zip((0.0, 0.10, -0.05), gaps, strict=True)]  # fmt: skip
    average = sum(halves) / 3
    spread = math.sqrt(sum((h - average) ** 2 for h in halves) / 2 / 3)
    assert result.val_loss is not None
    assert result.val_loss.error == pytest.approx(spread)


def test_the_table_says_how_sure_a_gap_is(make: Make, tmp_path: Path) -> None:
    comparison = compare(six(make)[0], out=tmp_path / "out", html=True)
    gaps = [row[3] for row in comparison.cells()]
    assert gaps == ["", "+3.08 ± 1.00"]
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(comparison.table())
    assert "…" not in capture.get()  # all of it in 80 columns
    assert "± 1.00" in capture.get()
    notes = " ".join(comparison.notes())
    assert "Means over seeds 1, 2, 3; ± is the standard error" in notes
    assert comparison.page is not None
    assert "+3.08 ± 1.00" in comparison.page.read_text()
    # what differs is the recipe: the seed is no difference of a pool
    assert {one.key for one in comparison.differences if not one.bookkeeping} == {
        "precision.fprop.x.format", "precision.name",
    }  # fmt: skip


def test_the_band_is_drawn_around_the_gap(make: Make, tmp_path: Path) -> None:
    result = compare(six(make)[0], out=tmp_path / "out").results[1]
    axes = Figure().add_subplot()
    label = _gap_curve(axes, result, colour="k", dash="-", framed=[])
    assert label.text == "nvfp4 (3 seeds)  +3.08 ± 1.00%"
    (band,) = axes.collections
    tokens, gaps = band.get_paths()[0].vertices.T
    assert (tokens.min(), tokens.max()) == (TOKENS, STEPS * TOKENS)
    assert result.matched is not None
    middle = 100 * result.matched.gap[-1]
    assert (gaps.min(), gaps.max()) == pytest.approx((middle - 1, middle + 1))


def test_one_seed_has_no_error(make: Make, tmp_path: Path) -> None:
    runs = [make("fp8", 1), make("nvfp4", 1, 0.02)]
    base, result = compare(runs, out=tmp_path / "out").results
    assert (base.run.name, result.run.name) == ("fp8-seed1", "nvfp4-seed1")
    assert result.loss.error is None
    assert result.band is None


def test_a_seed_without_its_baseline_is_named(make: Make, tmp_path: Path) -> None:
    runs = [make("fp8", 1), make("nvfp4", 1), make("nvfp4", 2)]
    with pytest.raises(
        UserError, match=r"^seed: nvfp4 \(2 seeds\) and the baseline fp8-seed1.*\(2: "
    ):
        compare(runs, out=tmp_path / "out")


def test_seeds_of_one_recipe_need_another(make: Make, tmp_path: Path) -> None:
    runs = [make("fp8", 1), make("fp8", 2, 0.03)]
    with pytest.raises(UserError, match="one recipe with several seeds"):
        compare(runs, out=tmp_path / "out")
    # one by one, by force: how much a seed alone moves a loss
    result = compare(runs, out=tmp_path / "out", force=True).results[1]
    assert result.loss.gap == pytest.approx(0.03)


def test_a_run_made_twice_is_not_a_seed(make: Make, tmp_path: Path) -> None:
    runs = [make("fp8", 1), make("nvfp4", 1, 0.01)]
    again = write_run(
        tmp_path / "again", gap=0.03, seed=1,
        precision={"name": "nvfp4", "fprop": {"x": {"format": "nvfp4"}}},
    )  # fmt: skip
    results = compare([*runs, again], out=tmp_path / "out").results
    assert [r.loss.gap for r in results[1:]] == pytest.approx([0.01, 0.03])


def test_variants_of_one_name_are_told_apart(make: Make, tmp_path: Path) -> None:
    runs = [make("fp8", seed) for seed in (1, 2)] + [make("nvfp4", seed) for seed in (1, 2)]
    for seed in (1, 2):
        precision = {"name": "nvfp4", "fprop": {"x": {"format": "nvfp4", "scale": "cap256"}}}
        runs.append(write_run(tmp_path / f"cap-seed{seed}", seed=seed, precision=precision))
    names = [result.run.name for result in compare(runs, out=tmp_path / "out").results]
    assert names == ["fp8 (2 seeds)", "nvfp4-seed1 (2 seeds)", "cap-seed1 (2 seeds)"]


def test_seeds_of_other_lengths_meet_where_all_have_rows(make: Make, tmp_path: Path) -> None:
    runs = [make("fp8", 1), make("fp8", 2), make("nvfp4", 1, 0.01)]
    runs.append(make("nvfp4", 2, 0.03, steps=range(1, 101)))
    result = compare(runs, out=tmp_path / "out").results[1]
    assert result.tokens == 100 * TOKENS
    assert result.loss.gap == pytest.approx(0.02)
    assert result.loss.error == pytest.approx(0.01)


def test_a_diverged_seed_makes_no_number_of_the_mean(make: Make, tmp_path: Path) -> None:
    runs = [make("fp8", 1), make("fp8", 2), make("nvfp4", 1, 0.01)]
    runs.append(make("nvfp4", 2, rows={"loss": math.nan}))
    comparison = compare(runs, out=tmp_path / "out")
    assert comparison.cells()[1][2:4] == ["diverged", "-"]
