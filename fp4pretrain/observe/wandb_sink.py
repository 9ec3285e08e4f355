"""Weights & Biases, the real package, imported here and nowhere else.

A run has its whole config there, tags and tables of its recipe (``About``), and the artifacts ``plan-ID``
and ``audit-ID``; its charts run over tokens, so that runs of other batch sizes lie on one axis. The
numbers that runs are sorted by are in its summary as ``final/NAME``.

The run's id is kept in ``run_dir/wandb/run_id``: a resumed run gives it back and goes on in the same wandb
run. A run that is resumed or goes back repeats the steps after its checkpoint; wandb's history cannot be
cut, so the steps it has already are not sent again (metrics.jsonl has the repeated ones). What the guard
and the triggers did is in series of its own, ``events/skipped``, ``events/rollback``, ...: how many so far,
at wandb's own newest step; and each is an alert of an online run.

Logging must never end a training run: whatever goes wrong here costs one line on the console.
"""

from __future__ import annotations

import netrc
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from fp4pretrain.config import WandbConfig
from fp4pretrain.errors import UserError, first_line
from fp4pretrain.files import write_text
from fp4pretrain.observe.about import About
from fp4pretrain.observe.sink import DECIDED, HAPPENED, STOPPED, Row
from fp4pretrain.observe.sites import scale_shares

MODES = ("auto", "online", "offline", "disabled")
PROJECT = "fp4pretrain"  # where neither the config nor wandb's own variables name one
# $WANDB_MODE -> ours; wandb has older words for two of them.
_MODES = {"dryrun": "offline", "run": "online", "shared": "online"}


def stored_run_id(run_dir: Path | str) -> str | None:
    """The id of the wandb run that ``run_dir`` was last logged to, if any."""
    path = _id_path(Path(run_dir))
    return path.read_text(encoding="utf-8").strip() if path.exists() else None


@dataclass
class WandbSink:
    """Send rows to wandb.

    ``settings.mode``: ``online``, ``offline`` (written under ``run_dir/wandb``, for ``wandb sync`` later),
    ``disabled`` (nothing, not even the import), or ``auto``: what WANDB_MODE says; without it online
    where an API key is set (the environment or netrc, as ``wandb login`` leaves it), otherwise offline.
    An online run that cannot reach its server goes on offline, and says so. Where a setting is None or
    empty, wandb's own variable (WANDB_PROJECT, WANDB_RUN_GROUP, WANDB_TAGS, ...) counts; the tags of
    ``about`` come beside either.

    ``resume_id``: the wandb run to continue, ``stored_run_id(run_dir)`` when resuming from a
    checkpoint; None makes a new one. Raises ``UserError`` for an unknown mode only.
    """

    config: Mapping[str, Any]
    run_dir: Path
    settings: WandbConfig = field(default_factory=WandbConfig)
    about: About = field(default_factory=About)
    resume_id: str | None = None
    _run: Any = field(init=False, default=None, repr=False)
    _newest: int = field(init=False, default=0, repr=False)  # the first step to send
    _repeated: int = field(init=False, default=-1, repr=False)  # up to here the run was before
    _stopped: bool = field(init=False, default=False, repr=False)
    _kept: dict[str, bytes] = field(init=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        mode = self.settings.mode
        if mode not in MODES:
            raise UserError(f"logging.wandb.mode: unknown mode {mode!r}; choose {', '.join(MODES)}")
        if mode == "auto" and (named := os.environ.get("WANDB_MODE")):
            mode = _MODES.get(named, named)
        if mode == "disabled":
            return
        try:
            self._run = self._start(mode)
            self._tell()
        except Exception as error:  # any failure of a logger: say it once, train on
            _say(f"did not start ({first_line(error)}); going on with metrics.jsonl alone")
            self._run = None

    @property
    def run_id(self) -> str | None:
        """The id of the wandb run, None where there is none."""
        return None if self._run is None else str(self._run.id)

    def write(self, row: Row) -> None:
        """Log a row at its step. Rows of steps that the wandb run has already are left out."""
        if self._run is None:
            return
        step = row["step"]
        try:
            if row.get("event") in DECIDED | HAPPENED:
                self._stopped = self._stopped or row["event"] == STOPPED
                if row["event"] in HAPPENED or step > self._repeated:
                    self._record(row)
            elif step >= max(self._run.starting_step, self._newest):
                self._newest = step
                self._run.log(_shown(row), step=step)
                self._remember()
        except Exception as error:  # as above
            _say(f"stopped at step {step} ({first_line(error)}); metrics.jsonl goes on")
            self._run = None

    def summarize(self, values: Mapping[str, float]) -> None:
        """Put numbers of the finished run beside its charts, at no step: its summary, by which wandb's
        table of runs is sorted."""
        if self._run is not None:
            try:
                self._run.summary.update(dict(values))
            except Exception as error:  # as above
                _say(f"took no summary ({first_line(error)})")

    def rewind(self, step: int) -> None:
        """Leave the repeated steps out until the run is past those that were sent."""
        self._newest += 1

    def _record(self, row: Row) -> None:
        event = str(row["event"])
        self._newest = max(row["step"], self._run.starting_step, self._newest)
        values = {"tokens": row["tokens"], f"events/{event}": row.get("count", 1)}
        self._run.log(values, step=self._newest)
        self._remember()
        if not self._run.offline:
            told = {k: v for k, v in row.items() if k not in ("event", "count", "tokens")}
            text = ", ".join(f"{key} {value}" for key, value in told.items())
            level = "ERROR" if event == STOPPED else "WARN"
            self._run.alert(title=f"{self._run.name}: {event}"[:63], text=text, level=level)

    def _remember(self) -> None:
        """Store the newest step sent. An online run could ask the server for it, an offline run could ask
        nobody."""
        path = _newest_path(Path(self.run_dir))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, f"{self._newest}\n")

    def close(self) -> None:
        """Upload what is left, end the wandb run (as failed where the guard stopped it), and say in one
        line where it is."""
        if self._run is None:
            return
        if not self._run.offline:  # asking an offline run for its url prints a warning
            where = f"this run is at {self._run.url}"
        else:
            parts = sorted(Path(self.run_dir).glob(f"wandb/offline-run-*-{self._run.id}"))
            folders = " ".join(map(str, parts)) or self._run.settings.sync_dir
            where = f"kept offline; upload it with: wandb sync {folders}"
        try:
            self._keep()
            self._run.finish(exit_code=int(self._stopped))
        except Exception as error:  # as above
            where = f"did not finish cleanly ({first_line(error)})"
        _say(where)
        self._run = None

    def _tell(self) -> None:
        """Files, and the tables of a new run (or of one that goes on as another experiment)."""
        import wandb

        self._keep()
        if self._newest == 0 or self.about.changed:
            tables = {
                name: wandb.Table(columns=list(one.columns), data=[list(row) for row in one.rows])
                for name, one in self.about.tables.items()
            }
            if tables:
                self._run.log(tables, step=max(self._newest, self._run.starting_step))

    def _keep(self) -> None:
        """Files of the run's folder as artifacts, those that changed since. Of equal content the server
        keeps one version, so a resumed run adds none."""
        import wandb

        for path in (Path(self.run_dir) / name for name in self.about.files):
            if not path.is_file() or self._kept.get(path.name) == path.read_bytes():
                continue
            self._kept[path.name] = path.read_bytes()
            artifact = wandb.Artifact(f"{path.stem}-{self._run.id}", type=path.stem)
            artifact.add_file(str(path))
            self._run.log_artifact(artifact)

    def _start(self, mode: str) -> Any:
        Path(self.run_dir).mkdir(parents=True, exist_ok=True)
        _have_home(Path(self.run_dir))
        import wandb  # slow to import, and not needed by a run that does not log to it

        has_key = mode == "auto" and has_api_key(wandb.setup().settings.base_url)
        online = mode == "online" or has_key
        try:
            run = self._init(wandb, "online" if online else "offline")
        except wandb.Error as error:
            if not online:
                raise
            _say(f"not reachable ({first_line(error)}); logging offline, for wandb sync later")
            run = self._init(wandb, "offline")
        run.define_metric("tokens")
        run.define_metric("*", step_metric="tokens")
        path = _id_path(Path(self.run_dir))
        path.parent.mkdir(parents=True, exist_ok=True)
        if self.resume_id is not None and stored_run_id(self.run_dir) == self.resume_id == run.id:
            self._newest = _newest_sent(Path(self.run_dir)) + 1
            self._repeated = max(self._newest, run.starting_step) - 1
        write_text(path, run.id + "\n")
        return run

    def _init(self, wandb: Any, mode: str) -> Any:
        given = self.settings
        own = [tag for tag in os.environ.get("WANDB_TAGS", "").split(",") if tag]
        tags = dict.fromkeys([*self.about.tags, *(given.tags or own)])
        return wandb.init(
            mode=mode,
            dir=self.run_dir,
            config=dict(self.config),
            project=given.project or os.environ.get("WANDB_PROJECT") or PROJECT,
            entity=given.entity,
            group=given.group,
            job_type=given.job_type,
            tags=list(tags) or None,
            name=given.name or os.environ.get("WANDB_NAME") or Path(self.run_dir).name,
            id=self.resume_id,
            resume=None if self.resume_id is None else "allow",
            settings=wandb.Settings(
                console="off",  # captured output would hold every redraw of the progress bar
                quiet=True,  # no page of summary at the end; where the run lies is said below
                silent=mode == "offline",
                init_timeout=60,
            ),
        )


def _shown(row: Row) -> dict[str, Any]:
    """What wandb is sent of a row: its numbers and words, and the observers' statistics as a table and
    as a histogram of scales for each operand. A list is for metrics.jsonl, where runs are compared."""
    shown = {k: v for k, v in row.items() if k != "event" and not isinstance(v, list | Mapping)}
    observed = row.get("observed")
    if not isinstance(observed, Mapping):
        return shown
    import wandb

    names = [name for name in observed if name not in ("sites", "scales")]
    columns = zip(observed["sites"], *(observed[name] for name in names), strict=True)
    table = wandb.Table(columns=["site", *names], data=[list(one) for one in columns])
    shown["observe/sites"] = table
    for operand, counts in scale_shares(observed).items():
        octaves = sorted(counts)
        edges = np.arange(octaves[0], octaves[-1] + 2)
        shares = np.array([counts.get(octave, 0.0) for octave in edges[:-1].tolist()])
        shown[f"observe/scales/{operand}"] = wandb.Histogram(np_histogram=(shares, edges))
    return shown


def where_to() -> str:
    """Where a run with ``logging.wandb.mode=auto`` would log to, in one clause."""
    named = os.environ.get("WANDB_MODE")
    base_url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    if named:
        return f"{_MODES.get(named, named)}, as $WANDB_MODE says"
    if has_api_key(base_url):
        return f"online at {base_url}: an API key is set"
    return "offline, for wandb sync later: no API key is set (wandb login sets one)"


def has_api_key(base_url: str) -> bool:
    """Whether wandb would find credentials without asking for them."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    hosts = [urlsplit(base_url).netloc]
    if "WANDB_BASE_URL" not in os.environ:
        hosts.append("api.wandb.ai")  # keys of the hosted service, wherever it now answers
    try:
        entries = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any(host in entries for host in hosts)


def _have_home(run_dir: Path) -> None:
    """wandb does not start without a home folder, which a container's unknown user lacks: HOME is then
    a folder of the run."""
    try:
        Path.home()
    except RuntimeError:
        os.environ["HOME"] = str(run_dir.absolute() / "wandb")


def _id_path(run_dir: Path) -> Path:
    return run_dir / "wandb" / "run_id"


def _newest_path(run_dir: Path) -> Path:
    return run_dir / "wandb" / "newest_step"


def _newest_sent(run_dir: Path) -> int:
    """The newest step that the wandb run in ``run_dir`` was sent; -1 where none is recorded."""
    try:
        return int(_newest_path(run_dir).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return -1


def _say(text: str) -> None:
    print(f"wandb: {text}", flush=True)
