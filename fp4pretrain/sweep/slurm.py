"""Every run of a sweep as a Slurm job, by submitit.

A job starts ``launch/torchrun.sh`` on each of its nodes. Shortly before its time limit, and where it is
preempted, Slurm's signal makes the run save, and submitit puts the job into the queue again. The command
waits for all jobs and then compares; ended before that, it leaves them in the queue, and the same command
waits for those that are still there instead of starting them twice.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fp4pretrain.config import SweepConfig
from fp4pretrain.errors import UserError, first_line
from fp4pretrain.files import write_text
from fp4pretrain.presets import launch_dir
from fp4pretrain.sweep.planning import Outcome, Planned
from fp4pretrain.sweep.progress import Progress
from fp4pretrain.sweep.starting import arguments, last_words, open_log, outcome
from fp4pretrain.train.run_dir import JOB, LOG, SUBMITTED

_POLL = 10.0  # seconds between two looks at the queue
# As launch/slurm.sbatch: minutes, and seconds for saving before a job ends. (submitit says 5 minutes.)
_TOLD = {"ntasks_per_node": 1, "time": 24 * 60, "signal_delay_s": 300}
_TIMES = 1000  # a job may be put into the queue again after this many time limits


@dataclass
class Job:
    """What a job does on each of its nodes; submitit stores it and calls it there.

    ``arguments``: of ``fp4pretrain train``. ``folder``: the run's.
    """

    script: str
    arguments: list[str]
    ranks: int
    folder: str
    _process: subprocess.Popen[bytes] | None = field(default=None, init=False, compare=False)

    def __call__(self) -> int:
        import submitit

        job = submitit.JobEnvironment()
        environment = os.environ | {
            "NNODES": str(job.num_nodes),
            "NODE_RANK": str(job.node),
            "NPROC_PER_NODE": str(self.ranks),
            "MASTER_ADDR": job.hostnames[0],
            "MASTER_PORT": str(20000 + int(job.raw_job_id) % 10000),
        }
        with open_log(Path(self.folder)) as log:
            self._process = subprocess.Popen(
                ["bash", self.script, *self.arguments], env=environment, stdout=log, stderr=log
            )
        status = self._process.wait()
        if status:
            raise RuntimeError(f"status {status}; see {LOG} of {self.folder}")
        return status

    def checkpoint(self) -> Any:
        """Called by submitit before the job ends: the run saves, and the job is queued again."""
        import submitit

        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            # This runs as a signal's handler inside Popen.wait, whose lock a second wait would never get.
            with suppress(ChildProcessError):
                os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        return submitit.helpers.DelayedSubmission(
            Job(self.script, self.arguments, self.ranks, self.folder)
        )


class Slurm:
    """Submits runs and waits for them. Raises UserError where submitit or Slurm is not here."""

    def __init__(self, settings: SweepConfig) -> None:
        try:
            import submitit  # noqa: F401
        except ImportError:
            raise UserError(
                "sweep.launcher: slurm needs submitit; pip install 'fp4pretrain[slurm]'"
            ) from None
        for command in ("sbatch", "squeue"):
            if shutil.which(command) is None:
                raise UserError(
                    f"sweep.launcher: slurm needs {command}, which is not here; start this on a node "
                    "that submits jobs, or use sweep.launcher=processes"
                )
        self._settings = settings
        self.at_once = max(1, settings.jobs)

    def train(
        self,
        runs: list[Planned],
        *,
        until: float | None,
        progress: Progress,
        told: Callable[[Outcome], None],
    ) -> list[Outcome]:
        """Every run as a job, ``jobs`` of them in the queue at once; ``told`` is called with each as it
        ends."""
        waiting = list(runs)
        jobs: dict[Path, tuple[Planned, str]] = {}
        ended: dict[Path, Outcome] = {}
        while waiting or jobs:
            while waiting and (self._settings.jobs == 0 or len(jobs) < self._settings.jobs):
                run = waiting.pop(0)
                if until is not None and time.time() >= until:
                    ended[run.path] = Outcome(run, run.told, "left")
                    continue
                progress.start(run)
                jobs[run.path] = run, self._job_of(run, until=until)
            queued = in_queue([number for _, number in jobs.values()])
            for run in [run for run, number in jobs.values() if number not in queued]:
                del jobs[run.path]
                progress.end(run)
                ended[run.path] = self._ended(run, until=until)
                told(ended[run.path])
            if jobs:
                time.sleep(_POLL)
        return [ended[run.path] for run in runs]

    def _job_of(self, run: Planned, *, until: float | None) -> str:
        """The number of the run's job: of the one in the queue, or else of a new one."""
        file = run.path / JOB
        if file.is_file():
            number = file.read_text(encoding="utf-8").strip()
            if in_queue([number]):
                return number
        given = arguments(run, until=until)
        job = Job(
            str(launch_dir() / "torchrun.sh"), given, self._settings.ranks, str(run.path.absolute())
        )
        number = str(self._submit(run, job))
        write_text(file, number + "\n")
        return number

    def _submit(self, run: Planned, job: Job) -> str:
        import submitit

        executor = submitit.AutoExecutor(
            folder=str(run.path / SUBMITTED), slurm_max_num_timeout=_TIMES
        )
        told = {"job_name": run.path.name, **_TOLD, **(self._settings.slurm or {})}
        if run.config.parallel.device != "cpu":
            told.setdefault("gpus_per_node", self._settings.ranks)
        try:
            executor.update_parameters(**{f"slurm_{key}": value for key, value in told.items()})
        except NameError as error:  # submitit's word for a parameter that it does not know
            reason = first_line(error)
            raise UserError(f"sweep.slurm: {reason}; see submitit's parameters of sbatch") from None
        try:
            return str(executor.submit(job).job_id)
        except submitit.core.utils.FailedJobError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"sweep.slurm: sbatch refused the job ({reason}); correct it") from None

    def _ended(self, run: Planned, *, until: float | None) -> Outcome:
        """A job that is gone is finished, or was stopped by the budget, or failed."""
        over = until is not None and time.time() >= until
        return outcome(run, problem=None if over else last_words(run.path))


def in_queue(numbers: list[str]) -> set[str]:
    """Which of the jobs Slurm still has."""
    if not numbers:
        return set()
    asked = ["squeue", "--noheader", "--format", "%A", "--jobs", ",".join(numbers)]
    done = subprocess.run(asked, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return set(done.stdout.split()) & set(numbers)
    if len(numbers) > 1:  # one that Slurm has forgotten fails all of them
        return set().union(*(in_queue([number]) for number in numbers))
    # a controller that does not answer for a while has lost no job
    return set() if "Invalid job id" in done.stderr else set(numbers)
