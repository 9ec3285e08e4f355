"""The page: what a reader sees of it, in a headless browser where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
import pytest
from report_lab import STEPS, TOKENS, write_run

from fp4pretrain.config import compose, plan_of
from fp4pretrain.costs import flop_shares
from fp4pretrain.errors import UserError
from fp4pretrain.report import Options, compare
from fp4pretrain.report.load import load_run
from fp4pretrain.report.record import as_json
from fp4pretrain.report.rows import POINTS, read
from fp4pretrain.report.watch import Watched, server

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
# A reader changes the statistic, goes back in time, and switches the first curve off.
READER = """
const field = (id) => document.getElementById(id);
const choose = (id, value, kind) => {
  field(id).value = value; field(id).dispatchEvent(new Event(kind));
};
choose("heat-statistic", "1", "change");
choose("heat-time", "0", "input");
Plotly.restyle(field("chart-losses"), { visible: "legendonly" }, [0]);
const labels = [...document.querySelectorAll("#chart-losses .legendtext")];
const boxes = labels.map((one) => one.getBoundingClientRect());
const frame = field("chart-losses").getBoundingClientRect();
const within = boxes.every((one) => one.bottom <= frame.bottom + 1);
const scrolled = [...document.querySelectorAll("#chart-losses .scrollbar")]
  .some((one) => one.getBoundingClientRect().height > 0);
const apart = boxes.every((one, i) => i === 0 || one.top >= boxes[i - 1].bottom - 1);
document.body.dataset.read = JSON.stringify({
  z: field("heat").data[0].z, when: field("heat-when").textContent, legend: labels.length, apart,
  whole: within && !scrolled,
  charts: document.querySelectorAll(".main-svg").length,
  wide: document.documentElement.scrollWidth > innerWidth,
  hidden: field("chart-losses").data[0].visible,
});
"""


def observe(path: Path) -> None:
    """Two observations of two sites."""
    with (path / "metrics.jsonl").open("a") as file:
        for number in (1, 2):
            observed = {
                "sites": ["0.fc1.fprop.x", "1.fc1.fprop.x"],
                "sqnr_db": [20.0 + number, 30.0],
                "underflow": [0.1 * number, None],
                "scales": [{"0": 1.0}, {}],
            }
            row = {"event": "observe", "step": number, "tokens": number * TOKENS}
            file.write(json.dumps({**row, "observed": observed}) + "\n")


def test_a_reader_of_nineteen_runs(tmp_path: Path) -> None:
    """One of them is in progress, one diverged, one is shorter, one has another config."""
    train = {"train": {"steps": STEPS}}
    runs = [write_run(tmp_path / f"demo-run{n:02}-x", gap=0.002 * n, **train) for n in range(16)]
    runs.append(write_run(tmp_path / "demo-going-x", **{"train": {"steps": 2 * STEPS}}))
    runs.append(write_run(tmp_path / "demo-nan-x", rows={"loss": "NaN"}, **train))
    runs.append(write_run(tmp_path / "demo-short-x", steps=range(1, 100), **train))
    observe(runs[3])
    comparison = compare(runs, out=tmp_path / "out", options=Options(html=True, force=True))
    assert comparison.page is not None
    html = comparison.page.read_text()
    assert "All runs: demo-*-x" in html
    for part in ('id="chart-losses"', 'id="heat"', 'id="heat-statistic"', "nan diverged"):
        assert part in html, part
    if BROWSER is None:
        pytest.skip(
            "no chromium on this machine"
        )  # no Python package; all above has passed without
    read_it = tmp_path / "read.html"
    read_it.write_text(html.replace("</body>", f"<script>{READER}</script></body>"))
    seen = {}
    for width in (1200, 390):
        shown = subprocess.run(
            [
                BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom",
                f"--window-size={width},2000", "--virtual-time-budget=20000", f"file://{read_it}",
            ],
            capture_output=True, text=True, timeout=200, check=True,
        ).stdout  # fmt: skip
        found = re.search(r'data-read="([^"]*)"', shown)
        assert found, "the page's script failed"
        seen[width] = json.loads(found[1].replace("&quot;", '"'))
        assert re.search(r"going</b>.*undecided|going is not finished: step 200 of 400", shown)
        assert "nan diverged" in shown
    for width, found in seen.items():
        assert found["charts"] >= 4, width
        assert found["z"] == [[0.1], [None]] and found["when"].startswith("1,024")
        assert found["hidden"] == "legendonly"
        assert not found["wide"], f"a reader must scroll sideways at {width}"
    assert seen[1200]["legend"] == 19 and seen[1200]["apart"]
    assert seen[1200]["whole"], "a reader must scroll the legend to see all names"


def test_millions_of_rows_are_thinned_to_means(tmp_path: Path) -> None:
    """Every point is the mean of its rows; evaluations, events and observations stay whole."""
    run = write_run(tmp_path / "long", steps=range(1, 3 * POINTS), every=1000)
    observe(run)
    loaded = load_run(run, name="long")
    assert loaded.thinned == 3 and len(loaded.loss) == POINTS
    rows = read(run / "metrics.jsonl")
    assert loaded.loss.values[1] == pytest.approx(rows.losses[3:6].mean())
    assert loaded.loss.tokens[1] == rows.tokens[5] and loaded.loss.tokens[-1] == rows.tokens[-1]
    assert len(loaded.val_loss) == 11  # after 1000, 2000, ... 11000 of 11999 steps
    assert len(loaded.observed) == 2


def test_thinning_changes_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three seeds each of a recipe that is behind, one that is ahead and one that chance hides: the same
    validation gaps, intervals and verdicts, and a training gap within a hundredth of itself, whether all
    2400 rows are points or 100 are."""
    noise = np.random.default_rng(5)
    runs = []
    for name, gap in (("bf16", 0.0), ("behind", 0.04), ("ahead", -0.04), ("hidden", 0.0002)):
        for seed in (1, 2, 3):
            own = 1 + gap + 0.002 * noise.standard_normal()
            steps = range(1, 2401)
            runs.append(write_run(tmp_path / f"{name}-{seed}", gap=own - 1, steps=steps, batch=85, seed=seed,
                                  precision={"fprop": {"x": {"format": name}}}))  # fmt: skip
    found = {}
    for points in (4000, 100):
        monkeypatch.setattr("fp4pretrain.report.rows.POINTS", points)
        monkeypatch.setattr("fp4pretrain.report.load.POINTS", points)
        comparison = compare(runs, out=tmp_path / str(points))
        assert comparison.results[0].run.thinned == (1 if points == 4000 else 24)
        found[points] = as_json(comparison)["results"]
    assert [one["verdict"] for one in found[4000]] == ["behind", "ahead", "undecided"]
    for whole, thin in zip(found[4000], found[100], strict=True):
        for key in ("verdict", "gap", "low", "high", "pairs", "seeds", "diverged"):
            assert thin[key] == whole[key], key
        train = [one["endpoints"]["loss"] for one in (whole, thin)]
        assert train[0]["verdict"] == train[1]["verdict"]
        assert train[1]["gap"] == pytest.approx(train[0]["gap"], rel=0.01, abs=1e-5)


@pytest.mark.parametrize("loss", ["5e-05", '"NaN"', "0.00012345678901234567", "12", "1.5}x"])
def test_a_number_written_in_another_way_is_read_as_json_reads_it(
    tmp_path: Path, loss: str
) -> None:
    """Beside rows of the usual form, whose digits are read column by column."""
    lines = [f'{{"event": "train", "step": {s}, "tokens": {85 * s}, "loss": {9.5 / s}, "lr": 1}}' for s in
             range(1, 120)]  # fmt: skip
    lines[57] = f'{{"event": "train", "step": 58, "tokens": 4930, "loss": {loss}, "lr": 1}}'
    file = tmp_path / "metrics.jsonl"
    file.write_text("\n".join(lines) + "\n")
    if loss == "1.5}x":
        with pytest.raises(UserError, match="line 58 is no JSON object"):
            read(file)
        return
    expected = [json.loads(line) for line in lines]
    found = read(file)
    assert found.steps.tolist() == [row["step"] for row in expected]
    assert found.tokens.tolist() == [row["tokens"] for row in expected]
    wanted = [float(row["loss"]) for row in expected]
    np.testing.assert_allclose(found.losses, wanted, rtol=1e-15)


def test_flop_shares_by_hand() -> None:
    """Two layers of d 4, ffn 8, one head, no gate: linears 48, 16, 32, 32, head 20, sequence 16."""
    config = compose(
        "precision=nvfp4 precision.keep.last_blocks=1 model.num_layers=2 model.hidden_size=4 "
        "model.ffn_hidden_size=8 model.num_attention_heads=1 model.num_query_groups=1 "
        "model.activation=gelu model.vocab_size=5 model.seq_length=16".split()
    )
    block, head, attention = 6 * (48 + 16 + 32 + 32), 6 * 20, 12 * 2 * 4 * 16
    shares = flop_shares(plan_of(config), config.model)
    total = 2 * block + head + attention
    assert shares == {
        "4 bits": pytest.approx(block / total), "BF16": pytest.approx(1 - block / total),
    }  # fmt: skip


def test_a_watched_page_follows_the_runs(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a"), tmp_path / "b"]

    def compared() -> Any:
        return compare([one for one in runs if one.exists()], out=tmp_path / "out")

    watched = Watched(runs, compared)
    assert watched.refresh() and "give two runs" in watched.page
    assert not watched.refresh()
    write_run(runs[1], gap=0.01)
    served = server(watched, 0)
    from threading import Thread

    Thread(target=served.serve_forever, daemon=True).start()
    try:
        first = urlopen(f"http://127.0.0.1:{served.server_port}/stamp").read()
        assert watched.refresh() and 'id="chart-gaps"' in watched.page
        assert urlopen(f"http://127.0.0.1:{served.server_port}/stamp").read() != first
        assert watched.stamp.encode() in urlopen(f"http://127.0.0.1:{served.server_port}/").read()
    finally:
        served.shutdown()
        served.server_close()
