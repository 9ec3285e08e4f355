"""A run on wandb as a baseline: wandb's API is a stand-in that answers what a server would."""

from __future__ import annotations

from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import wandb

from fp4pretrain.baseline import WandbPath, wandb_path
from fp4pretrain.config import RunConfig, compose, plan_of
from fp4pretrain.errors import UserError
from fp4pretrain.fingerprint import ORDER, VALIDATION, plan_digest, whole
from fp4pretrain.observe import wandb_runs
from fp4pretrain.report.live import LiveGap

DATA = {ORDER: "o", VALIDATION: {"validation": {"digest": "v", "tokens": 1, "sequences": 1}}}
SMALL = ["model.num_layers=2", "precision.keep.last_blocks=0", "optim.warmup=3"]
AT = WandbPath("team/runs/ab12")


def config(*overrides: str) -> RunConfig:
    return compose([*SMALL, *overrides])


def fingerprint(of: RunConfig) -> dict[str, Any]:
    return whole(of, plan_of(of), DATA)


class Server:
    """``wandb.Api`` and the one run that it knows."""

    id, name = "ab12", "base"

    def __init__(self, of: RunConfig, **more: Any) -> None:
        told = {"plan": plan_digest(of, plan_of(of)), "fingerprint_data": DATA, **more}
        self.config = {**asdict(of), **told}
        self.state = "finished"
        self.silent = False
        self.rows = [{"tokens": 100, "val_loss": 4.0}, {"tokens": 200, "val_loss": 2.0}]
        self.asked: list[Any] = []

    def __call__(self, overrides: Any = None) -> Server:
        self.asked.append(overrides)
        return self

    def run(self, path: str) -> Server:
        if path != AT.path:
            raise ValueError(f"Could not find run {path}\nand more")
        return self

    def scan_history(self, keys: list[str], page_size: int) -> list[dict[str, Any]]:
        if self.silent:
            raise ConnectionError
        return [row for row in self.rows if all(key in row for key in keys)]


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    found = Server(config("precision=bf16"))
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "https://api.wandb.ai")
    monkeypatch.setattr(wandb, "Api", found)
    return found


@pytest.mark.parametrize(
    "text, expected",
    [
        ("wandb:team/runs/ab12", AT),
        ("https://wandb.ai/team/runs/runs/ab12", WandbPath(AT.path, "https://wandb.ai")),
        (
            "https://w.example:8/team/runs/runs/ab12/overview?nw=x",
            WandbPath(AT.path, "https://w.example:8"),
        ),
        ("wandb:team/runs", None),
        ("https://wandb.ai/team/runs", None),
        ("runs/fp8-seed1", None),
        (None, None),
    ],
)
def test_names_of_runs_on_wandb(text: str | None, expected: WandbPath | None) -> None:
    assert wandb_path(text) == expected


def test_the_gap_to_a_run_on_wandb(server: Server) -> None:
    """At its evaluations its loss, between them a line; it quantizes nothing, so its loss is BF16's too.
    Its config and the digests beside it are all that the refusals need."""
    gap = LiveGap(AT, fingerprint(config("precision=nvfp4")))
    found = gap.at(150, {"val_loss": 3.3, "val_loss_bf16": 3.15})
    assert found == pytest.approx({"gap": 0.1, "gap_bf16": 0.05, "baseline_val_loss": 3.0})
    assert gap.at(201, {"val_loss": 3.3}) == {}
    assert server.asked == [None]  # it is finished: asked once
    keys = [key for key, _, _ in gap.differences(asdict(config("precision=nvfp4")))]
    assert "precision.fprop.x.format" in keys and "optim.lr" not in keys


def test_a_run_that_goes_on_is_asked_again_and_a_silent_server_costs_a_line(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    server.state = "running"
    gap = LiveGap(AT, fingerprint(config("precision=nvfp4")))
    assert gap.at(200, {"val_loss": 3.0})["gap"] == 0.5
    assert len(server.asked) == 1  # it has come so far
    server.rows.append({"tokens": 300, "val_loss": 1.0})
    assert gap.at(300, {"val_loss": 1.5})["gap"] == 0.5
    server.config = {}
    server.silent = True
    assert gap.at(400, {"val_loss": 1.5}) == {}
    assert (
        capsys.readouterr().out.count("warning: baseline: wandb:team/runs/ab12 cannot be read") == 1
    )


@pytest.mark.parametrize(
    "change, named",
    [
        (
            "optim.eps=1e-5",
            r"differs in more than the recipe: optim\.eps \(1e-08 there, 1e-05 here\)",
        ),
        ("seed=5", "data.seed"),
        ("precision=bf16", "own recipe"),
    ],
)
def test_what_differs_in_more_than_the_recipe_is_refused(
    server: Server, change: str, named: str
) -> None:
    with pytest.raises(UserError, match=named):
        LiveGap(AT, fingerprint(config("precision=nvfp4", change)))


def test_runs_that_cannot_be_a_baseline(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = fingerprint(config("precision=nvfp4"))
    server.config["changes"] = {"step_5": "optim.lr: 1 -> 2"}
    with pytest.raises(UserError, match="resumed as another experiment"):
        LiveGap(AT, ours)
    server.config = {"lr": 1.0}  # of another program
    with pytest.raises(UserError, match="team/runs/ab12 has no fingerprint"):
        LiveGap(AT, ours)
    with pytest.raises(
        UserError, match=r"wandb:a/b/c cannot be read \(Could not find run a/b/c\);"
    ):
        LiveGap(WandbPath("a/b/c"), ours)
    monkeypatch.setattr(wandb_runs, "has_api_key", lambda base: False)
    with pytest.raises(UserError, match="no API key is set; set one with wandb login"):
        LiveGap(AT, ours)
    assert len(server.asked) == 3


def test_a_page_of_another_server_is_asked_there(server: Server) -> None:
    ours = fingerprint(config("precision=nvfp4"))
    for address in ("https://wandb.ai", "https://w.example"):
        LiveGap(WandbPath(AT.path, address), ours)
    assert server.asked == [None, {"base_url": "https://w.example"}]


def test_a_page_of_wandb_ai_is_not_asked_of_a_server_of_ones_own(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = SimpleNamespace(base_url="https://w.example")
    monkeypatch.setattr(wandb, "setup", lambda: SimpleNamespace(settings=settings))
    LiveGap(WandbPath(AT.path, "https://wandb.ai"), fingerprint(config("precision=nvfp4")))
    assert server.asked == [{"base_url": "https://api.wandb.ai"}]


def test_of_two_rows_at_the_same_tokens_the_later_counts(server: Server) -> None:
    server.rows.append({"tokens": 200, "val_loss": 1.0})
    gap = LiveGap(AT, fingerprint(config("precision=nvfp4")))
    assert gap.at(200, {"val_loss": 3.0})["baseline_val_loss"] == 1.0
