"""Runs that differ in their seed alone are one result, with the interval of its gap from pairs."""

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
from fp4pretrain.report import Options, compare, table
from fp4pretrain.report.notes import notes
from fp4pretrain.report.picture import _gap_curve
from fp4pretrain.report.student import quantile

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
    assert (base.seeds, result.seeds) == ((1, 2, 3), (3, 1, 2))
    mean = sum((1, 1.10, 0.95)) / 3
    assert base.losses["loss"] == pytest.approx(loss_at((STEPS - 9.5) * TOKENS) * mean)
    # 2, 5 and 2%: mean 3%, standard deviation sqrt(3)%, over sqrt(3) pairs, t of 2 degrees of freedom
    gap = result.gaps["loss"]
    assert gap.gap == pytest.approx(0.03)
    assert sorted(gap.pairs) == pytest.approx([0.02, 0.02, 0.05])
    assert quantile(2) == pytest.approx(2.92, abs=1e-4)
    assert gap.relative is not None
    assert (gap.relative.low, gap.relative.high) == pytest.approx((0.0008, 0.0592), abs=1e-6)
    assert gap.verdict == "behind"
    assert result.band == pytest.approx([0.0292] * STEPS, abs=1e-6)
    # validation has half of a run's level, so its pairs differ by other gaps
    halves = [(1 + ((1 + v) * (1 + g) - 1) / 2) / (1 + v / 2) - 1
              for v, g in zip((0.0, 0.10, -0.05), gaps, strict=True)]  # fmt: skip
    average = sum(halves) / 3
    spread = math.sqrt(sum((h - average) ** 2 for h in halves) / 2 / 3)
    assert result.gap is not None and result.gap.relative is not None
    assert result.gap.relative.half == pytest.approx(quantile(2) * spread)
    assert result.gap.gap == pytest.approx(average)


def test_the_table_says_how_sure_a_gap_is(make: Make, tmp_path: Path) -> None:
    comparison = compare(six(make)[0], out=tmp_path / "out", options=Options(html=True))
    gaps = [row[2] for row in comparison.cells()]
    assert gaps == ["", "+1.53 ± 1.59"]
    console = Console(width=80, color_system=None)
    with console.capture() as capture:
        console.print(table(comparison))
    assert "…" not in capture.get()  # all of it in 80 columns
    assert "± 1.59" in capture.get()
    assert max(map(len, capture.get().splitlines())) <= 80
    assert "± is half of the 90% interval over pairs of runs of one seed" in " ".join(
        notes(comparison)
    )
    assert comparison.page is not None
    assert "+1.53 ± 1.59" in comparison.page.read_text()
    # what differs is the recipe: the seed is no difference of a pool
    assert {one.key for one in comparison.differences} == {"precision.fprop.x.format"}


def test_the_band_is_drawn_around_the_gap(make: Make, tmp_path: Path) -> None:
    result = compare(six(make)[0], out=tmp_path / "out").results[1]
    axes = Figure().add_subplot()
    label = _gap_curve(axes, result, colour="k", dash="-", framed=[])
    assert label.text == "nvfp4 (3 seeds)  +3.00 ± 2.92%"
    (band,) = axes.collections
    tokens, gaps = band.get_paths()[0].vertices.T
    assert (tokens.min(), tokens.max()) == (TOKENS, STEPS * TOKENS)
    assert result.matched is not None
    middle = 100 * result.matched.gap[-1]
    assert (gaps.min(), gaps.max()) == pytest.approx((middle - 2.92, middle + 2.92), abs=1e-3)


def test_one_seed_has_no_interval_and_no_verdict(make: Make, tmp_path: Path) -> None:
    runs = [make("fp8", 1), make("nvfp4", 1, 0.02)]
    base, result = compare(runs, out=tmp_path / "out").results
    assert (base.run.name, result.run.name) == ("fp8-seed1", "nvfp4-seed1")
    assert result.gap is not None
    assert (result.gap.relative, result.gap.verdict) == (None, "undecided")
    assert result.band is None


def test_a_seed_without_its_partner_is_left_out_and_named(make: Make, tmp_path: Path) -> None:
    runs = [make("fp8", 1), make("fp8", 3), make("nvfp4", 1, 0.02), make("nvfp4", 2, 0.5)]
    comparison = compare(runs, out=tmp_path / "out")
    result = comparison.results[1]
    assert result.seeds == (1,)
    assert result.gaps["loss"].gap == pytest.approx(0.02)
    assert "nvfp4 (2 seeds): seeds without a partner are left out: 2, 3." in notes(comparison)


def test_seeds_of_one_recipe_need_another(make: Make, tmp_path: Path) -> None:
    runs = [make("fp8", 1), make("fp8", 2, 0.03)]
    with pytest.raises(UserError, match="one recipe with several seeds"):
        compare(runs, out=tmp_path / "out")


def test_without_a_common_seed_means_are_compared_by_force_only(make: Make, tmp_path: Path) -> None:
    runs = [make("fp8", 1), make("fp8", 2), make("nvfp4", 3, 0.01), make("nvfp4", 4, 0.03)]
    with pytest.raises(UserError, match=r"^seed: nvfp4 \(2 seeds\) \(3, 4\) .* no seed in common"):
        compare(runs, out=tmp_path / "out")
    comparison = compare(runs, out=tmp_path / "out", options=Options(force=True))
    result = comparison.results[1]  # force keeps the pools
    assert result.gaps["loss"].gap == pytest.approx(0.02)
    assert result.gap is not None and result.gap.verdict == "undecided"
    assert "FORCED: the runs also differ in seed." in notes(comparison)


def test_orders_of_sums_are_no_seeds_of_their_own(make: Make, tmp_path: Path) -> None:
    runs = [make("fp8", 1), make("fp8", 2), make("nvfp4", 1, 0.02), make("nvfp4", 2, 0.03)]
    precision = {"name": "nvfp4", "fprop": {"x": {"format": "nvfp4"}}}
    other = write_run(
        tmp_path / "sums", gap=0.04, seed=1, precision=precision, train={"sum_order": 1}
    )
    _, result = compare([*runs, other], out=tmp_path / "out").results
    assert result.seeds == (1, 2)
    assert sorted(result.gaps["loss"].pairs) == pytest.approx([0.03, 0.03])


def test_pairs_that_share_a_seed_say_so(make: Make, tmp_path: Path) -> None:
    runs = []
    for recipe in ("fp8", "nvfp4"):
        for order in (1, 2):
            precision = {"name": recipe, "fprop": {"x": {"format": recipe}}}
            path = tmp_path / f"{recipe}-{order}"
            runs.append(write_run(path, seed=1, data={"seed": order}, precision=precision))
    comparison = compare(runs, out=tmp_path / "out")
    assert comparison.results[1].seeds == (1, "1/2")
    assert any("share a seed (weights)" in note for note in notes(comparison))


def test_a_run_made_twice_is_not_a_seed(make: Make, tmp_path: Path) -> None:
    runs = [make("fp8", 1), make("nvfp4", 1, 0.01)]
    again = write_run(
        tmp_path / "again", gap=0.03, seed=1,
        precision={"name": "nvfp4", "fprop": {"x": {"format": "nvfp4"}}},
    )  # fmt: skip
    results = compare([*runs, again], out=tmp_path / "out").results
    assert [r.gaps["loss"].gap for r in results[1:]] == pytest.approx([0.01, 0.03])


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
    gap = result.gaps["loss"]
    assert gap.gap == pytest.approx(0.02)
    assert gap.relative is not None
    assert gap.relative.half == pytest.approx(quantile(1) * 0.01)


def test_a_diverged_seed_makes_no_number_of_the_mean(make: Make, tmp_path: Path) -> None:
    runs = [make("fp8", 1), make("fp8", 2), make("nvfp4", 1, 0.01)]
    runs.append(make("nvfp4", 2, rows={"loss": math.nan}))
    comparison = compare(runs, out=tmp_path / "out")
    assert comparison.results[1].diverged == ("nvfp4-seed2",)
    assert math.isnan(comparison.results[1].gaps["loss"].gap)
    assert comparison.cells()[1][4] == "diverged"
