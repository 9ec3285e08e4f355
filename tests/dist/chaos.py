"""Kill -9 of a random rank at a random moment, again and again, under torchrun's restarts.

``Chaos`` starts ``launch/torchrun.sh`` with MAX_RESTARTS and resume=auto and kills, as often as it
is told. Each kill comes at one of four moments, drawn from a seed:

    start     while the ranks start, find their checkpoint and load it
    step      some time after a new row
    write     some time after a save began
    publish   as soon as the save's last files appear, within milliseconds of its rename

After each, before the next ranks are there: the newest checkpoint is compared, bit for bit, with
the one that an undisturbed run wrote at that step.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from records import weights

ROOT = Path(__file__).resolve().parents[2]
MOMENTS = ("start", "step", "write", "publish")
RUN = (
    "model.num_layers=2 model.hidden_size=64 model.num_attention_heads=2 model.num_query_groups=2 "
    "model.ffn_hidden_size=128 model.seq_length=64 train.micro_batch=2 train.global_batch=8 "
    "train.eval_interval=8 data.valid_tokens=256 checkpoint.interval=2 "
    "precision=nvfp4 logging.wandb.mode=disabled logging.console=quiet data.mock=true"
).split()


@dataclass(frozen=True)
class Kill:
    """``saving``: a save was under way; ``kept``: the step of the newest checkpoint afterwards."""

    moment: str
    rank: int
    saving: bool
    kept: int


@dataclass
class Chaos:
    """``run`` is the run's folder, ``whole`` that of the undisturbed one, every checkpoint kept."""

    run: Path
    whole: Path
    size: int
    seed: int
    patience: float = 600.0  # seconds for anything awaited, on a machine that is busy with other things
    kills: list[Kill] = field(default_factory=list)
    _begun: float = 0.0

    def train(self, overrides: Sequence[str], *, moments: Sequence[str]) -> None:
        """The whole run, with a kill at each of ``moments`` in random order. Fails where it ends otherwise
        than well."""
        rng = random.Random(self.seed)
        moments = rng.sample(moments, len(moments))
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}:{os.environ.get('PYTHONPATH', '')}",
            "OMP_NUM_THREADS": "1",
            "NPROC_PER_NODE": str(self.size),
            "MAX_RESTARTS": str(len(moments)),
        }
        command = [ROOT / "launch" / "torchrun.sh", *overrides, f"run_dir={self.run}"]
        with self._log.open("wb") as log:
            script = subprocess.Popen(
                [*command, "resume=auto"], env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            for moment in moments:
                self._kill(script, self._ranks(script), moment=moment, rng=rng)
            assert script.wait(timeout=self.patience) == 0, self._said()
        finally:
            for process in family(script):
                process.kill()
            script.kill()
            script.wait()

    def summary(self) -> str:
        """How many kills, at which moments, how many of them during a save."""
        moments = Counter(kill.moment for kill in self.kills)
        ranks = Counter(kill.rank for kill in self.kills)
        return (
            f"{len(self.kills)} kills, {sum(kill.saving for kill in self.kills)} during a save; "
            f"at {dict(sorted(moments.items()))}; of ranks {dict(sorted(ranks.items()))}; "
            f"newest checkpoints after them {[kill.kept for kill in self.kills]}"
        )

    def left_over(self) -> list[str]:
        """Files of the run's folder that no finished run has, and processes that outlived it."""
        files = [str(path) for path in self.run.rglob("*") if path.name.startswith(".")]
        files += [str(path) for path in self.run.rglob("*.rewritten")]
        return files + [
            str(p) for p in psutil.process_iter() if f"run_dir={self.run}" in _arguments(p)
        ]

    @property
    def _log(self) -> Path:
        return self.run.with_suffix(".log")

    @property
    def _checkpoints(self) -> Path:
        return self.run / "checkpoints"

    @property
    def _metrics(self) -> Path:
        return self.run / "metrics.jsonl"

    def _ranks(self, script: subprocess.Popen) -> list[psutil.Process]:
        """The ranks of this round of processes, in order; nothing may be left of the last one."""
        found: dict[int, psutil.Process] = {}

        def all_there() -> bool:
            found.clear()
            found.update({_rank(process): process for process in family(script)})
            return set(range(self.size)) <= found.keys()

        self._begun = time.time()
        self._wait(script, all_there, every=0.2)
        dead = [p for p in family(script) if p.status() == psutil.STATUS_ZOMBIE]
        assert not dead, dead
        return [found[rank] for rank in range(self.size)]

    def _kill(
        self,
        script: subprocess.Popen,
        ranks: list[psutil.Process],
        *,
        moment: str,
        rng: random.Random,
    ) -> None:
        self._await_moment(script, moment, rng=rng)
        victim = rng.randrange(self.size)
        saving = self._saves()
        ranks[victim].kill()
        _, alive = psutil.wait_procs(ranks, timeout=self.patience)
        assert not alive, self._said()
        self.kills.append(Kill(moment, victim, saving, self._newest()))

    def _await_moment(self, script: subprocess.Popen, moment: str, *, rng: random.Random) -> None:
        if moment == "start":
            time.sleep(rng.uniform(0, 10))
            return
        before = self._record()
        self._wait(script, lambda: self._record() != before, every=0.02)
        rows = self._rows() + rng.randint(3, 6)
        self._wait(script, lambda: self._rows() >= rows, every=0.02)
        if moment == "write":
            self._wait(script, self._saves)
        if moment == "publish":
            self._wait(script, self._publishes)
        else:
            time.sleep(rng.uniform(0, 0.3))

    def _newest(self) -> int:
        """The step of the newest checkpoint, which must be what it should be. 0: none yet."""
        best = max((kill.kept for kill in self.kills), default=0)
        pointer = self._checkpoints / "latest"
        if best == 0 and not pointer.exists():
            return 0
        name = pointer.read_text().strip()
        mine, theirs = weights(self._checkpoints / name), weights(self.whole / "checkpoints" / name)
        assert mine.keys() == theirs.keys()
        assert not [key for key in mine if not torch.equal(mine[key], theirs[key])], name
        step = int(name.removeprefix("step_"))
        assert step >= best, f"the checkpoint of step {best} was lost"
        return step

    def _wait(
        self, script: subprocess.Popen, until: Callable[[], bool], *, every: float = 0.001
    ) -> None:
        deadline = time.monotonic() + self.patience
        while not until():
            assert script.poll() is None, f"it ended before the last kill\n{self._said()}"
            assert time.monotonic() < deadline, self._said()
            time.sleep(every)

    def _record(self) -> int:
        """Which file the rows are in: a resumed run replaces it by one cut at its checkpoint."""
        return self._metrics.stat().st_ino if self._metrics.exists() else 0

    def _rows(self) -> int:
        return self._metrics.read_bytes().count(b"\n")

    def _saves(self) -> bool:
        """Whether a folder is being written, not left over from the ranks before these."""
        for folder in self._checkpoints.glob(".step_*.partial"):
            try:
                if folder.stat().st_ctime > self._begun:
                    return True
            except FileNotFoundError:  # renamed meanwhile
                continue
        return False

    def _publishes(self) -> bool:
        return any(self._checkpoints.glob(".step_*.partial/run.json"))

    def _said(self) -> str:
        return f"{self.summary()}\n{self._log.read_text()[-6000:]}"


def family(script: subprocess.Popen) -> list[psutil.Process]:
    """All processes that a launch script started, directly or not."""
    try:
        return psutil.Process(script.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _rank(process: psutil.Process) -> int:
    """RANK of a process that torchrun started, -1 for others: torchrun, and what ranks start."""
    try:
        parent = process.parent()
        if parent is not None and any("torchrun" in part for part in _arguments(parent)[:2]):
            return int(process.environ().get("RANK", "-1"))
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        pass
    return -1


def _arguments(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []
