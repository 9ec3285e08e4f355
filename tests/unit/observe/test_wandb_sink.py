"""The real wandb package, run offline in a temporary directory."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb_log import finished, not_recorded

from fp4pretrain.config import WandbConfig
from fp4pretrain.errors import UserError
from fp4pretrain.observe import About, Table, WandbSink, stored_run_id
from fp4pretrain.observe.wandb_sink import has_api_key

CONFIG = {"seed": 1234, "precision": {"fprop": {"x": {"format": "nvfp4"}}}}


@pytest.fixture(autouse=True)
def _no_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_offline_records_config_rows_and_the_token_axis(tmp_path: Path) -> None:
    sink = WandbSink(
        CONFIG, tmp_path, WandbConfig(mode="auto", project="fp4", tags=["a"], name="one")
    )
    sink.write({"event": "train", "step": 1, "tokens": 777, "loss": 4.125})
    sink.write({"event": "eval", "step": 1, "tokens": 777, "val_loss": 4.25})
    sink.close()
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 1
    texts = (b"nvfp4", b"1234", b"tokens", b"777", b"4.125", b"val_loss", b"4.25")
    assert not_recorded(tmp_path, *texts) == []


def test_an_evaluation_of_a_finished_run_is_in_its_summary(tmp_path: Path) -> None:
    first = WandbSink(CONFIG, tmp_path, WandbConfig(mode="offline", name="one"))
    first.write({"event": "train", "step": 1, "tokens": 777, "loss": 4.125})
    first.close()
    later = WandbSink({}, tmp_path, WandbConfig(mode="offline"), resume_id=stored_run_id(tmp_path))
    later.summarize({"eval/task/acc": 0.34375})
    later.close()
    assert not_recorded(tmp_path, b"eval/task/acc", b"0.34375") == []
    silent = WandbSink({}, tmp_path, WandbConfig(mode="disabled"))
    silent.summarize({"eval/task/acc": 1.0})


class _Recorder:
    """wandb's run as far as the sink talks to it: steps never go back."""

    def __init__(self, *, offline: bool, starting_step: int = 0) -> None:
        self.offline, self.starting_step, self.name = offline, starting_step, "one"
        self.logged: list[tuple[int, dict[str, object]]] = []
        self.alerts: list[tuple[str, str, str]] = []
        self.exit_code: int | None = None
        self.url = ""

    def log(self, values: dict[str, object], *, step: int) -> None:
        assert not self.logged or step >= self.logged[-1][0]
        self.logged.append((step, values))

    def alert(self, *, title: str, text: str, level: str) -> None:
        self.alerts.append((title, text, level))

    def finish(self, *, exit_code: int) -> None:
        self.exit_code = exit_code


def _sink_to(recorder: _Recorder, tmp_path: Path) -> WandbSink:
    sink = WandbSink(CONFIG, tmp_path, WandbConfig(mode="disabled"))
    sink._run = recorder
    return sink


@pytest.mark.parametrize("offline", [True, False])
def test_events_are_series_at_steps_that_never_go_back(tmp_path: Path, offline: bool) -> None:
    recorder = _Recorder(offline=offline)
    sink = _sink_to(recorder, tmp_path)
    at = {"tokens": 9}
    for step in (1, 2, 3, 4):
        sink.write({"event": "train", "step": step, **at, "loss": 1.0})
    sink.write({"event": "rollback", "step": 4, **at, "count": 2, "reason": "spike", "to_step": 2})
    sink.rewind(2)
    for step in (3, 4, 5):
        if step == 3:
            sink.write({"event": "skipped", "step": step, **at, "count": 7, "reason": "loss"})
        sink.write({"event": "train", "step": step, **at, "loss": 0.5})
    assert [(s, v["loss"]) for s, v in recorder.logged if "loss" in v] == [
        *((step, 1.0) for step in (1, 2, 3, 4)),
        (5, 0.5),
    ]
    events = [(s, k, v[k]) for s, v in recorder.logged for k in v if k.startswith("events/")]
    assert events == [(4, "events/rollback", 2), (5, "events/skipped", 7)]
    told = [
        ("one: rollback", "step 4, reason spike, to_step 2", "WARN"),
        ("one: skipped", "step 3, reason loss", "WARN"),
    ]
    assert recorder.alerts == ([] if offline else told)


def test_the_real_package_takes_events(tmp_path: Path) -> None:
    sink = WandbSink(CONFIG, tmp_path, WandbConfig(mode="offline"))
    sink.write({"event": "skipped", "step": 3, "tokens": 5, "count": 1, "reason": "loss"})
    sink.close()
    assert not_recorded(tmp_path, b"events/skipped") == []


def test_an_offline_run_ends_with_one_line_that_says_how_to_upload_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_SILENT")
    sink = WandbSink(CONFIG, tmp_path, WandbConfig(mode="offline"))
    sink.write({"event": "train", "step": 1, "tokens": 1, "loss": 1.0})
    sink.close()
    lines = [line for text in capfd.readouterr() for line in text.splitlines()]
    (folder,) = tmp_path.glob("wandb/offline-run-*")
    assert lines == [f"wandb: kept offline; upload it with: wandb sync {folder}"]


def test_a_resumed_run_continues_the_same_wandb_run_and_a_new_one_does_not(tmp_path: Path) -> None:
    ids = []
    for resume in (False, True, False):
        resume_id = stored_run_id(tmp_path) if resume else None
        sink = WandbSink(CONFIG, tmp_path, WandbConfig(mode="offline"), resume_id=resume_id)
        ids.append(sink.run_id)
        assert stored_run_id(tmp_path) == sink.run_id
        sink.close()
    assert ids[0] is not None
    assert ids[0] == ids[1] != ids[2]


def test_disabled_leaves_nothing(tmp_path: Path) -> None:
    sink = WandbSink(CONFIG, tmp_path / "run", WandbConfig(mode="disabled"))
    sink.write({"step": 1, "loss": 1.0})
    sink.close()
    assert sink.run_id is None
    assert not (tmp_path / "run").exists()


def test_an_unknown_mode_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"logging\.wandb\.mode.*'on'.*auto"):
        WandbSink(CONFIG, tmp_path, WandbConfig(mode="on"))


def test_wandb_that_cannot_start_costs_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # makes the import fail
    sink = WandbSink(CONFIG, tmp_path, WandbConfig(mode="offline"))
    sink.write({"event": "train", "step": 1, "tokens": 1, "loss": 1.0})
    sink.close()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1
    assert "did not start" in lines[0]


def test_an_unreachable_server_is_said_and_the_run_goes_on_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real_init = wandb.init

    def init(**arguments: object) -> object:
        if arguments["mode"] == "online":
            raise wandb.errors.CommError("no route to host")
        return real_init(**arguments)

    monkeypatch.setattr(wandb, "init", init)
    sink = WandbSink(CONFIG, tmp_path, WandbConfig(mode="online"))
    sink.write({"event": "train", "step": 1, "tokens": 1, "loss": 3.0625})
    sink.close()
    assert "not reachable (no route to host)" in capsys.readouterr().out
    assert not_recorded(tmp_path, b"3.0625") == []


@pytest.mark.parametrize(
    ("environment", "entry", "found"),
    [
        ({}, None, False),
        ({"WANDB_API_KEY": "k" * 40}, None, True),
        ({}, "machine api.wandb.ai login user password k", True),
        ({}, "machine server.example login user password k", True),
        ({}, "machine github.com login user password k", False),
        (
            {"WANDB_BASE_URL": "https://server.example"},
            "machine api.wandb.ai login user password k",
            False,
        ),
    ],
)
def test_auto_finds_a_key_where_wandb_would(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
    entry: str | None,
    found: bool,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if entry is not None:
        (tmp_path / "netrc").write_text(entry + "\n")
        (tmp_path / "netrc").chmod(0o600)
    assert has_api_key("https://server.example") is found


def test_a_resumed_offline_run_sends_each_step_once(tmp_path: Path) -> None:
    """Nobody tells an offline run how far it was: the steps after its checkpoint are trained again and
    logged again, and the server that both parts are sent to would have them twice."""
    sent: list[list[int]] = []
    for steps in (range(1, 9), range(5, 13)):
        sink = WandbSink(
            CONFIG, tmp_path, WandbConfig(mode="offline"), resume_id=stored_run_id(tmp_path)
        )
        assert sink._run is not None
        log, part = sink._run.log, []

        # defaults bind the loop's variables; their types are wandb's own
        def recorded(values: dict, step: int, log=log, part=part) -> None:  # type: ignore[no-untyped-def]  # as wandb
            part.append(step)
            log(values, step=step)

        sink._run.log = recorded
        for step in steps:
            sink.write({"event": "train", "step": step, "tokens": step, "loss": 1.0})
        sink.close()
        sent.append(part)
    assert sent == [[*range(1, 9)], [*range(9, 13)]]
    fresh = WandbSink(CONFIG, tmp_path, WandbConfig(mode="offline"))
    assert fresh._newest == 0
    fresh.close()


def test_a_resumed_offline_runs_parts_are_uploaded_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        sink = WandbSink(
            CONFIG, tmp_path, WandbConfig(mode="offline"), resume_id=stored_run_id(tmp_path)
        )
        time.sleep(1.1)  # its folders are named by the second
        capfd.readouterr()
        sink.close()
    told = capfd.readouterr().out
    assert all(str(folder) in told for folder in tmp_path.glob("wandb/offline-run-*"))
    assert told.count("offline-run-") == 2


@pytest.mark.parametrize("mode", ["offline", "dryrun", "disabled"])
def test_wandbs_own_mode_counts_where_the_config_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)  # would be online
    monkeypatch.setenv("WANDB_MODE", mode)
    asked: list[str] = []
    monkeypatch.setattr(WandbSink, "_init", lambda *given: asked.append(given[2]) or _Fake())
    sink = WandbSink(CONFIG, tmp_path, WandbConfig(mode="auto"))
    assert asked == ([] if mode == "disabled" else ["offline"])
    assert (sink.run_id is None) is (mode == "disabled")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    WandbSink(CONFIG, tmp_path, WandbConfig(mode="online"))
    assert asked[-1] == "online"


class _Fake(_Recorder):
    id = "fake"

    def __init__(self) -> None:
        super().__init__(offline=True)

    def define_metric(self, *names: str, **how: str) -> None:
        """wandb's, of which nothing is needed here."""


def test_wandbs_own_names_count_where_the_config_says_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_PROJECT", "theirs")
    monkeypatch.setenv("WANDB_NAME", "their name")
    for settings, expected in (
        (WandbConfig(mode="offline"), ("theirs", "their name", ())),
        (WandbConfig(mode="offline", project="p", name="n", tags=["c"]), ("p", "n", ("c",))),
    ):
        sink = WandbSink(CONFIG, tmp_path, settings)
        assert sink._run is not None
        assert (sink._run.project, sink._run.name, sink._run.tags) == expected
        sink.close()


def test_observations_are_series_a_table_and_histograms(tmp_path: Path) -> None:
    """Offline too, where the package itself takes them: a failure would end the sink's run."""
    row = {
        "event": "observe",
        "step": 1,
        "tokens": 777,
        "observe/sqnr_db/fprop.x": 21.0,
        "worst": "0.fc1.fprop.x 20.0 dB",
        "observed": {
            "sites": ["0.fc1.fprop.x", "1.fc1.fprop.x"],
            "sqnr_db": [20.0, None],
            "scales": [{"-2": 0.25, "0": 0.75}, {"zero": 0.5, "0": 0.5}],
        },
    }
    recorder = _Recorder(offline=True)
    _sink_to(recorder, tmp_path).write(row)
    ((_, values),) = recorder.logged
    assert values["observe/sqnr_db/fprop.x"] == 21.0 and "observed" not in values
    assert values["observe/sites"].data == [["0.fc1.fprop.x", 20.0], ["1.fc1.fprop.x", None]]
    scales = values["observe/scales/fprop.x"]
    assert list(scales.bins) == [-2, -1, 0, 1]
    assert list(scales.histogram) == [0.25, 0.0, 1.25]
    sink = WandbSink(CONFIG, tmp_path / "run", WandbConfig(mode="offline", project="fp4"))
    sink.write(row)
    assert sink.run_id is not None
    sink.close()


ABOUT = About(
    tags=("nvfp4", "RHT16"),
    tables={"recipe": Table(("GEMM", "format"), [("fprop", "nvfp4"), ("dgrad", "mxfp4")])},
    files=("plan.txt", "audit.json"),
)


def _parts(path: Path, settings: WandbConfig) -> list[list[Any]]:
    """A run and what it goes on as after a checkpoint of step 2: what wandb's file of each part says."""
    for steps in ((1, 2, 3), (3, 4)):
        path.mkdir(exist_ok=True)
        (path / "plan.txt").write_text("the plan")
        sink = WandbSink(CONFIG, path, settings, ABOUT, stored_run_id(path))
        for step in steps:
            sink.write({"event": "train", "step": step, "tokens": 10 * step, "loss": 1.0})
            if step == 3:
                sink.write({"event": "trigger", "step": 3, "tokens": 30, "rule": "r"})
        (path / "audit.json").write_text(f'{{"steps": {len(steps)}}}')
        sink.summarize({"final/gap_percent": 2.5})
        sink.close()
        time.sleep(1.1)  # wandb names a part by the second
    return [finished(file) for file in sorted(path.glob("wandb/offline-run-*/*.wandb"))]


def _named(items: Any) -> dict[str, Any]:
    """The items of a record by key; a nested key is a path."""
    return {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}


def test_what_wandb_sync_would_send_of_a_run_and_of_its_resumption(tmp_path: Path) -> None:
    """Read back from wandb's own files: group, job type, tags, tables, artifacts, summary, each once."""
    settings = WandbConfig(mode="offline", group="sweep", job_type="baseline", tags=["mine"])
    parts = _parts(tmp_path / "run", settings)
    runs = [next(r.run for r in part if r.HasField("run")) for part in parts]
    (run_id,) = {run.run_id for run in runs}
    for run in runs:
        assert (run.run_group, run.job_type) == ("sweep", "baseline")
        assert list(run.tags) == ["nvfp4", "RHT16", "mine"]
    rows = [[_named(r.history.item) for r in part if r.HasField("history")] for part in parts]
    assert [[row["_step"] for row in part if "loss" in row] for part in rows] == [[1, 2, 3], [4]]
    every = [row for part in rows for row in part]
    tables = [(row["recipe._type"], row["recipe.nrows"]) for row in every if "recipe.nrows" in row]
    assert tables == [("table-file", 2)]
    assert sum("events/trigger" in row for row in every) == 1
    versions: list[dict[str, str]] = []
    for part in parts:
        sums = [_named(r.summary.update) for r in part if r.HasField("summary")]
        assert [one["final/gap_percent"] for one in sums if "final/gap_percent" in one] == [2.5]
        versions.append(
            {r.artifact.name: r.artifact.digest for r in part if r.HasField("artifact")}
        )
    plan, audit = f"plan-{run_id}", f"audit-{run_id}"
    assert versions[0][plan] == versions[1][plan]  # one version at the server
    assert versions[0][audit] != versions[1][audit]  # what each process counted


def test_a_run_that_the_guard_stops_again_at_the_same_step_has_failed_again(tmp_path: Path) -> None:
    recorder = _Recorder(offline=False)
    sink = _sink_to(recorder, tmp_path)
    sink._repeated = 5
    sink.write({"event": "stopped", "step": 5, "tokens": 9, "reason": "loss is nan"})
    sink.close()
    assert recorder.alerts == [] and recorder.exit_code == 1


def test_a_run_that_the_guard_stopped_has_failed(tmp_path: Path) -> None:
    """Diverged, or triggered: told at once where the run is online, and a resumed run's repeats are not."""
    recorder = _Recorder(offline=False)
    sink = _sink_to(recorder, tmp_path)
    sink._repeated = 5
    for step in (5, 6):
        sink.write({"event": "trigger", "step": step, "tokens": 9, "rule": "late", "holds": True})
    sink.write({"event": "stopped", "step": 7, "tokens": 9, "reason": "loss is nan"})
    sink.close()
    assert recorder.alerts == [
        ("one: trigger", "step 6, rule late, holds True", "WARN"),
        ("one: stopped", "step 7, reason loss is nan", "ERROR"),
    ]
    assert recorder.exit_code == 1
