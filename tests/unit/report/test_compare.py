"""compare on synthetic runs whose gap is known in closed form."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from report_lab import STEPS, TOKENS, loss_at, write_run
from rich.console import Console

from fp4pretrain.errors import UserError
from fp4pretrain.report import Comparison, Options, compare, table
from fp4pretrain.report.comparison import tokens_text
from fp4pretrain.report.differences import differences
from fp4pretrain.report.load import load_run
from fp4pretrain.report.notes import notes


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    return lambda name, **how: write_run(tmp_path / name, **how)


def _shown(comparison: Comparison) -> str:
    console = Console(width=200, color_system=None)
    with console.capture() as capture:
        console.print(table(comparison))
    return capture.get()


def test_gaps_losses_and_rates_are_those_put_in(make_run: Any, tmp_path: Path) -> None:
    runs = [make_run("bf16"), make_run("nvfp4", gap=0.02, rate=1500.0)]
    comparison = compare(runs, out=tmp_path / "out")
    base, run = comparison.results
    assert comparison.window == 20
    assert base.gap is None
    # The last 20 of 200 rows, 9.5 rows before the end on average.
    assert base.losses["loss"] == pytest.approx(loss_at((STEPS - 9.5) * TOKENS))
    assert run.gaps["loss"].gap == pytest.approx(0.02)
    assert run.gap is run.gaps["val_loss"]
    assert run.gap.loss == pytest.approx((loss_at(STEPS * TOKENS) + 0.1) * 1.01)
    assert run.gap.gap == pytest.approx(0.01)
    assert run.gap.nats == pytest.approx((loss_at(STEPS * TOKENS) + 0.1) * 0.01)
    assert "val_loss_bf16" not in run.gaps
    assert (base.tokens_per_second, run.tokens_per_second) == (1000.0, 1500.0)


def test_other_batch_size_and_a_shorter_run_are_matched_by_tokens(
    make_run: Any, tmp_path: Path
) -> None:
    base = make_run("bf16")
    short = make_run("nvfp4", gap=0.01, steps=range(1, 41), batch=3 * TOKENS)
    comparison = compare([short], baseline=base, out=tmp_path)
    result = comparison.results[1]
    assert result.tokens == 120 * TOKENS
    assert result.gaps["loss"].gap == pytest.approx(0.01)
    assert any("different tokens" in note for note in notes(comparison))


def test_the_table_holds_the_judgement(make_run: Any, tmp_path: Path) -> None:
    runs = [make_run("bf16"), make_run("mxfp4", gap=-0.005), make_run("nvfp4", gap=0.0213)]
    (runs[0] / "data.json").write_text('{"unigram_entropy": 4.5}')
    shown = _shown(compare(runs, out=tmp_path / "out"))
    assert re.search(r"nvfp4 .*\+1\.0[67] .*\+0\.0224 .*undecided .*1,000", shown)
    assert re.search(r"mxfp4 .*-0\.25 ", shown)
    assert "one pair shows no spread over seeds" in shown
    assert "4.5000 nats" in shown
    assert "Loss gap at 205K tokens, baseline bf16" in shown
    assert "BF16" not in comparison_header(runs, tmp_path)


def comparison_header(runs: list[Path], folder: Path) -> str:
    return " ".join(compare(runs, out=folder / "out").header())


def test_without_validation_the_training_loss_is_judged(make_run: Any, tmp_path: Path) -> None:
    runs = [make_run("bf16", every=1000), make_run("nvfp4", gap=0.02, every=1000)]
    comparison = compare(runs, out=tmp_path / "out")
    assert comparison.header()[1] == "train loss"
    assert comparison.results[1].gap is comparison.results[1].gaps["loss"]
    assert "mean of the last 20 logged rows" in " ".join(notes(comparison))


def test_a_run_that_skipped_and_went_back_is_compared_by_what_it_trained(
    make_run: Any, tmp_path: Path
) -> None:
    runs = [make_run("bf16"), make_run("nvfp4", gap=0.02)]
    metrics = runs[1] / "metrics.jsonl"
    lines = metrics.read_text().splitlines()
    bad = json.loads(lines[-2])  # the last training row
    assert bad["step"] == STEPS
    lines[-2] = json.dumps({**bad, "loss": "NaN"})
    spike = {"event": "spike", "step": 300, "tokens": 300 * TOKENS, "loss": 50.0}
    for row in (
        {"event": "skipped", "step": 150, "tokens": 150 * TOKENS},  # taken back, trained since
        spike,
        {"event": "rollback", "step": 300, "tokens": 300 * TOKENS, "to_step": 100},
        {"event": "skipped", "step": STEPS, "tokens": STEPS * TOKENS},
    ):
        lines.insert(-2, json.dumps(row))
    metrics.write_text("\n".join(lines) + "\n")
    comparison = compare(runs, out=tmp_path / "out")
    result = comparison.results[1]
    assert result.tokens == (STEPS - 1) * TOKENS
    assert result.gaps["loss"].gap == pytest.approx(0.02)
    assert "What happened to nvfp4: 2 x skipped, 1 x spike, 1 x rollback." in notes(comparison)


def test_validation_in_bf16_has_its_column_where_a_run_has_it(
    make_run: Any, tmp_path: Path
) -> None:
    base = make_run("fp8", rows={"val_loss_bf16": 2.0})
    run = make_run("nvfp4", rows={"val_loss_bf16": 2.06})
    comparison = compare([base, run], out=tmp_path)
    assert "BF16 gap %" in comparison.header()
    assert comparison.results[1].gaps["val_loss_bf16"].gap == pytest.approx(0.03)


def test_a_bf16_run_is_its_own_evaluation_in_bf16(make_run: Any, tmp_path: Path) -> None:
    """As the baseline and as a recipe beside one that quantizes."""
    end = loss_at(STEPS * TOKENS) + 0.1
    runs = [make_run("bf16"), make_run("nvfp4", gap=0.02, rows={"val_loss_bf16": end * 1.004})]
    result = compare(runs, out=tmp_path).results[1]
    assert result.gaps["val_loss"].gap == pytest.approx(0.01)
    assert result.gaps["val_loss_bf16"].gap == pytest.approx(0.004)
    result = compare(runs[::-1], out=tmp_path).results[1]
    assert result.gaps["val_loss_bf16"].gap == pytest.approx(1 / 1.004 - 1)


def test_endpoints_of_runs_of_other_lengths_are_at_common_tokens(
    make_run: Any, tmp_path: Path
) -> None:
    """A longer run's own last loss is no number beside a shorter one's."""
    runs = [make_run("bf16", steps=range(1, 101)), make_run("nvfp4", gap=0.02)]
    result = compare(runs, out=tmp_path).results[1]
    assert result.gap is not None
    assert result.gap.loss == pytest.approx((loss_at(100 * TOKENS) + 0.1) * 1.01)


def test_a_diverged_run_is_said_to_be(make_run: Any, tmp_path: Path) -> None:
    diverged = make_run("nvfp4", rows={"loss": "NaN"}, every=1000)
    comparison = compare([make_run("bf16", every=1000), diverged], out=tmp_path)
    assert comparison.cells()[1][1:5] == ["diverged", "-", "-", "diverged"]
    assert "DIVERGED: nvfp4." in notes(comparison)


@pytest.mark.parametrize(("factor", "by_itself"), [(1.46, False), (4.0, True)])
def test_a_run_that_rose_again_is_flagged(
    make_run: Any, tmp_path: Path, factor: float, by_itself: bool
) -> None:
    runs = [make_run("bf16"), make_run("nvfp4", gap=0.02)]
    metrics = runs[1] / "metrics.jsonl"
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    for row in rows[-60:]:
        row["loss" if "loss" in row else "val_loss"] *= factor
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    comparison = compare(runs, out=tmp_path)
    assert comparison.results[1].diverged == ("nvfp4",)
    assert comparison.cells()[1][4] == "diverged"
    assert compare(runs[::-1], out=tmp_path).baseline.diverged == ("nvfp4",) * by_itself


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 2},
        {"optim": {"eps": 1e-5, "lr": 1e-3}},
        {"optim": {"lr": 1e-3, "beta2": 0.9}},
        {"data": {"path": "elsewhere"}},
        {"train": {"micro_batch": 2}},
        {"precisions": {"name": "not the recipe, whatever its prefix"}},
    ],
)
def test_a_baseline_that_differs_in_more_than_the_recipe_is_refused(
    make_run: Any, tmp_path: Path, change: dict[str, Any]
) -> None:
    runs = [make_run("bf16"), make_run("nvfp4", **change)]
    with pytest.raises(UserError, match="more than the recipe") as refused:
        compare(runs, out=tmp_path / "out")
    assert "--force" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_key_that_came_after_a_run_counts_as_its_default(make_run: Any, tmp_path: Path) -> None:
    later = {"implementation": "fp4pretrain"}
    compare([make_run("bf16"), make_run("nvfp4", model=later)], out=tmp_path / "out")
    other = make_run("other", model={"implementation": "transformer_engine"})
    with pytest.raises(
        UserError, match=r"model.implementation \(transformer_engine against fp4pretrain\)"
    ):
        compare([make_run("before"), other], out=tmp_path / "out")


def test_a_forced_comparison_says_what_differs(make_run: Any, tmp_path: Path) -> None:
    runs = [make_run("bf16"), make_run("nvfp4", seed=2, data={"split": "1,0,0"})]
    forced = compare(runs, out=tmp_path / "out", options=Options(force=True))
    assert "FORCED: the runs also differ in data.split, seed." in notes(forced)


def test_the_refusal_names_key_and_both_values(make_run: Any, tmp_path: Path) -> None:
    runs = [make_run("bf16"), make_run("nvfp4", optim={"eps": 1e-5, "lr": 1e-3})]
    with pytest.raises(UserError, match=r"optim\.eps \(1e-05 against 1e-08\)"):
        compare(runs, out=tmp_path / "out")


@pytest.mark.parametrize(
    "change",
    [
        {"logging": {"wandb": {"mode": "offline"}}},
        {"resume": "auto"},
        {"baseline": "bf16"},
        {"checkpoint": {"interval": 100}},
        {"train": {"log_interval": 5}},
        {"parallel": {"tensor": 2}},
        {"precision": {"name": "another", "fprop": {"x": {"format": "bf16"}}}},
    ],
)
def test_what_shapes_no_curve_may_differ(
    make_run: Any, tmp_path: Path, change: dict[str, Any]
) -> None:
    base, other = (
        load_run(make_run(name, **config), name=name)
        for name, config in (("bf16", {}), ("other", change))
    )
    found = {one.key for one in differences(other, base)}
    assert found == (set() if "precision" in change else {"precision.fprop.x.format"})


def _break(path: Path, what: str) -> None:
    if what == "empty":
        (path / "metrics.jsonl").write_text("")
    else:
        (path / what).unlink()


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("empty", "no training loss"),
        ("metrics.jsonl", "no metrics.jsonl"),
        ("config.yaml", "no config.yaml"),
    ],
)
def test_what_a_run_lacks_is_named(make_run: Any, tmp_path: Path, what: str, said: str) -> None:
    runs = [make_run("bf16"), make_run("nvfp4")]
    _break(runs[1], what)
    with pytest.raises(UserError, match=said):
        compare(runs, out=tmp_path / "out")


def test_a_missing_run_disjoint_tokens_and_a_lonely_run_are_refused(
    make_run: Any, tmp_path: Path
) -> None:
    base = make_run("bf16", steps=range(1, 50))
    late = make_run("nvfp4", steps=range(100, 150))
    out = tmp_path / "out"
    with pytest.raises(UserError, match="no such run"):
        compare([base, tmp_path / "nowhere"], out=out)
    with pytest.raises(UserError, match=r"no tokens in common.*102K to 153K against 1.02K to 50"):
        compare([base, late], out=out)
    with pytest.raises(UserError, match="give two runs"):
        compare([base, base], out=out)
    with pytest.raises(UserError, match=r"neither a folder nor a \.png"):
        compare([base, late], out=tmp_path / "gap.pdf")


def test_the_picture_is_a_png_and_the_page_needs_no_other_file(
    make_run: Any, tmp_path: Path
) -> None:
    runs = [make_run("bf16"), make_run("nvfp4", gap=0.02, rows={"loss": "NaN"})]
    (runs[0] / "data.json").write_text('{"unigram_entropy": 4.5}')
    comparison = compare(runs, out=tmp_path / "gap.png", options=Options(html=True))
    assert comparison.picture == tmp_path / "gap.png"
    assert comparison.picture.read_bytes().startswith(b"\x89PNG")
    assert comparison.page == tmp_path / "gap.html"
    page = comparison.page.read_text()
    markup = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)  # plotly's own code
    assert not re.search(r'(src|href)="(?!data:)', markup)
    for text in ("nvfp4 diverged", "figure-gaps", "unigram entropy"):
        assert text in markup
    assert "run_dir" not in markup


def test_runs_of_one_name_are_told_apart(make_run: Any, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    comparison = compare([make_run("a/nvfp4"), make_run("b/nvfp4")], out=tmp_path / "out")
    assert [result.run.name for result in comparison.results] == ["a/nvfp4", "b/nvfp4"]


@pytest.mark.parametrize(
    ("tokens", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1024, "1.02K"),
        (999_600, "1M"),
        (1_048_576, "1.05M"),
        (26_214_400_000, "26.2B"),
        (1e12, "1T"),
    ],
)
def test_tokens_are_written_to_three_digits(tokens: float, text: str) -> None:
    assert tokens_text(tokens) == text
