"""The saved view, made by wandb's own package; the server alone is a stand-in."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest

from fp4pretrain.errors import UserError
from fp4pretrain.observe import wandb_view
from fp4pretrain.observe.wandb_view import save_view


def test_the_view_that_the_server_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its charts run over tokens, its runs are those of the group, sorted by the summary's gap."""
    pytest.importorskip("wandb_workspaces")
    import wandb_workspaces.workspaces as ws

    sent: list[Any] = []
    monkeypatch.setattr(ws.Workspace, "save", lambda self: sent.append(self._to_model()))
    monkeypatch.setattr(ws.Workspace, "url", property(lambda self: f"at {self.entity}"))
    assert save_view("team/runs", group="sweep-1", name="mine") == "at team"
    spec = json.loads(sent[0].spec.model_dump_json(by_alias=True))
    text = json.dumps(spec)
    for key in ("val_loss_bf16", "gap_bf16", "observe/sqnr_db/wgrad.dy", "events/rollback"):
        assert key in text, key
    lines = [
        panel["config"]
        for section in spec["section"]["panelBankConfig"]["sections"]
        for panel in section["panels"]
        if panel["viewType"] == "Run History Line Plot"
    ]
    assert lines and {line["xAxis"] for line in lines} == {"tokens"}
    (runs,) = spec["section"]["runSets"]
    assert "sweep-1" in json.dumps(runs["filters"])
    assert runs["sort"]["keys"][0]["key"] == {"section": "summary", "name": "final/gap_percent"}


def test_what_cannot_be_saved_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="'runs' is no ENTITY/PROJECT"):
        save_view("runs", group=None, name="mine")
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(UserError, match=r"pip install 'fp4pretrain\[wandb\]'"):
        save_view("team/runs", group=None, name="mine")

    class Refused:
        def save(self) -> None:
            raise ConnectionError("no route to host\nmore")

    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", sys.modules[__name__])
    monkeypatch.setattr(wandb_view, "made_view", lambda *_, **__: Refused())
    with pytest.raises(UserError, match=r"did not take the view \(no route to host\);"):
        save_view("team/runs", group=None, name="mine")
