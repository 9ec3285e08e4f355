"""Runs in processes of their own: where they are put, what they are told, what becomes of them.

A small script plays the run's processes where their training does not matter.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from fp4pretrain.errors import UserError
from fp4pretrain.overrides import expand_sweep
from fp4pretrain.sweep import Outcome, processes, slurm, train_all
from fp4pretrain.sweep.planning import Planned
from fp4pretrain.sweep.starting import last_words
from fp4pretrain.train.main import Stopped
from fp4pretrain.train.run_dir import JOB, LOG, START, record_finished, record_start

RUN = (
    "model.num_layers=1 model.hidden_size=32 model.num_attention_heads=2 model.ffn_hidden_size=64 "
    "model.seq_length=32 data.mock=true parallel.device=cpu precision=bf16 train.steps=8 "
    "train.micro_batch=1 train.global_batch=2 train.eval_interval=4 data.valid_tokens=64 logging=quiet "
    "optim.warmup=0 optim.decay=0 logging.wandb.mode=disabled"
).split()

# Plays a run: seed 13 fails, seed 14 is stopped before its end, the others finish; 21 and 22 wait for
# each other.
FAKE = f"""#!{sys.executable}
import json, os, pathlib, sys, time
given = sys.argv[1:]
start = pathlib.Path(given[given.index("--config") + 1])
told = dict(arguments=given, gpus=os.environ.get("CUDA_VISIBLE_DEVICES"), began=time.time())
history = dict(starts=[])
(start.parent / "begun").touch()
seed = next(int(line[6:]) for line in start.read_text().splitlines() if line.startswith("seed: "))
end = time.monotonic() + 120
while seed in (21, 22) and len(list(start.parent.parent.glob("*2[12]/begun"))) < 2:
    assert time.monotonic() < end, "alone"
    time.sleep(0.05)
if seed == 13:
    print("fp4pretrain: optim.lr: too much of it", file=sys.stderr)
    sys.exit(2)
if seed != 14:
    history["finished_step"] = 8
(start.parent / "history.json").write_text(json.dumps(history))
(start.parent / "told.json").write_text(json.dumps(told | dict(ended=time.time())))
"""


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text(FAKE)
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


def swept(*overrides: str, launcher: str = "processes") -> list[Outcome]:
    return train_all(expand_sweep([*RUN, f"sweep.launcher={launcher}", *overrides]))


def states(outcomes: list[Outcome]) -> list[str]:
    return [one.state for one in outcomes]


def told(path: str) -> dict[str, Any]:
    return json.loads((Path(path) / "told.json").read_text())


def test_processes_train_what_the_command_composed_and_one_may_fail(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = swept("optim.lr=1e9,1e-3", "sweep.jobs=2", "name=a")
    assert states(found) == ["failed", "finished"]
    assert "guard.max_skipped: 5 steps" in found[0].line
    assert "run 2 of 2: " in capsys.readouterr().out
    assert Path("runs/a-lr_0.001/checkpoints/latest").is_file()
    assert "guard.max_skipped" in Path("runs/a-lr_1e9", LOG).read_text()


def test_runs_share_gpus_and_each_sees_its_own(
    played: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs of two ranks on five GPUs, one of which is left over; the names are the user's."""
    monkeypatch.setattr(processes, "visible_gpus", lambda: ["4", "5", "6", "7", "9"])
    device = ("parallel.device=auto", "sweep.ranks=2", "sweep.jobs=1")
    assert states(swept("seed=21,22,23", *device)) == ["finished"] * 3
    runs = [told(f"runs/bf16-seed{n}") for n in (21, 22, 23)]
    assert {one["gpus"] for one in runs[:2]} == {"4,5", "6,7"}
    assert runs[2]["began"] >= min(one["ended"] for one in runs[:2])
    assert runs[0]["arguments"][:6] == [
        *("-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"),
        "--nproc-per-node",
    ]
    with pytest.raises(UserError, match=r"^sweep\.ranks: a run of 6 does not fit the 5 GPUs here"):
        swept("seed=1,2", "name=b", *device, "sweep.ranks=6", "train.global_batch=6")


def test_what_became_of_a_run_is_in_its_own_record(
    played: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command starts what is left, as it is composed anew."""
    command = ("seed=12,13,14", "sweep.jobs=3", "sweep.budget=1h")
    found = swept(*command)
    assert states(found) == ["finished", "failed", "left"]
    assert found[1].line == "optim.lr: too much of it"
    assert "2 of 3: " in capsys.readouterr().out
    stored = OmegaConf.load("runs/bf16-seed14/" + START)
    assert (stored.seed, stored.resume, stored.sweep.launcher) == (14, "auto", "here")
    assert "--until" in told("runs/bf16-seed14")["arguments"]


def test_the_budget_starts_no_process_and_a_signal_ends_all(
    played: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert states(swept("seed=1,2", "sweep.budget=0.0001s")) == ["left", "left"]
    assert not Path("runs").exists()
    one = processes.Processes._one

    def signalled(self: Any, run: Planned, gpus: str, *, until: float | None) -> Outcome:
        os.kill(os.getpid(), 15)
        return one(self, run, gpus, until=until)

    monkeypatch.setattr(processes.Processes, "_one", signalled)
    with pytest.raises(Stopped) as stopped:
        swept("seed=1,2")
    assert stopped.value.by_signal
    assert not Path("runs/bf16-seed2").exists()


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["sweep.launcher=here", "sweep.jobs=2"],
            r"sweep\.launcher: here trains one run at a time",
        ),
        (["sweep.jobs=0"], r"sweep\.jobs: 0 is for sweep\.launcher=slurm"),
        (["sweep.slurm={time: 3}"], r"sweep\.slurm: it says something to Slurm alone"),
        (["sweep.launcher=cloud"], r"sweep\.launcher: 'cloud' is unknown; choose here, proc"),
    ],
)
def test_keys_that_say_nothing_are_refused(overrides: list[str], line: str) -> None:
    with pytest.raises(UserError, match=f"^{line}"):
        swept("seed=1,2", *overrides)


def test_last_words(tmp_path: Path) -> None:
    assert last_words(tmp_path) == "it said nothing"
    elastic = "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n=====\n"
    (tmp_path / LOG).write_text(f"step 1\nTraceback\nRuntimeError: no\n{elastic}")
    assert last_words(tmp_path) == "RuntimeError: no"
    (tmp_path / LOG).write_text("step 1\nKilled\n\n")
    assert last_words(tmp_path) == "Killed"
    (tmp_path / LOG).write_text("fp4pretrain: a: b; c\nChildFailedError\n====\n")
    assert last_words(tmp_path) == "a: b; c"


class Cluster:
    """Plays Slurm and submitit: jobs run when the queue is asked about them, as ``FAKE`` would."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.parameters: dict[str, Any] = {}
        self.jobs: list[slurm.Job] = []
        self.queue: dict[str, slurm.Job] = {}
        self.most = 0
        cluster = self

        class Executor:
            def __init__(self, folder: str, **parameters: Any) -> None:
                cluster.parameters = {"folder": folder, **parameters}

            def update_parameters(self, **parameters: Any) -> None:
                cluster.parameters |= parameters

            def submit(self, job: slurm.Job) -> Any:
                cluster.jobs.append(job)
                cluster.queue[str(len(cluster.jobs))] = job
                return types.SimpleNamespace(job_id=str(len(cluster.jobs)))

        utils = types.SimpleNamespace(FailedJobError=type("FailedJobError", (Exception,), {}))
        stand_in = types.SimpleNamespace(
            AutoExecutor=Executor, core=types.SimpleNamespace(utils=utils)
        )
        monkeypatch.setitem(sys.modules, "submitit", stand_in)
        monkeypatch.setattr(slurm.shutil, "which", lambda name: f"/bin/{name}")
        monkeypatch.setattr(slurm, "in_queue", self.asked)
        monkeypatch.setattr(slurm, "_POLL", 0.0)

    def asked(self, numbers: list[str]) -> set[str]:
        """Every job that was seen in the queue once has ended when it is asked about again."""
        there = set(numbers) & self.queue.keys()
        self.most = max(self.most, len(there))
        for number in there:
            folder = Path(self.queue.pop(number).arguments[1]).parent
            if not folder.name.endswith("13"):
                (folder / "checkpoints").mkdir()
                (folder / "config.yaml").write_text((folder / START).read_text())
                record_start(folder, {})
                record_finished(folder, 8)
        return there


def test_every_run_is_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(monkeypatch)
    command = ("seed=11,12,13", "sweep.jobs=2", "sweep.ranks=4", "parallel.tensor=2")
    command += (
        "sweep.slurm={partition: gpu, nodes: 2}",
        "parallel.device=auto",
        "train.global_batch=8",
    )
    found = swept(*command, launcher="slurm")
    assert states(found) == ["finished", "finished", "failed"]
    assert cluster.most == 2
    assert (cluster.parameters["slurm_partition"], cluster.parameters["slurm_nodes"]) == ("gpu", 2)
    assert cluster.parameters["slurm_gpus_per_node"] == 4
    assert cluster.parameters["slurm_time"] == 1440  # submitit's own default is five minutes
    job = cluster.jobs[0]
    assert Path(job.script).name == "torchrun.sh" and Path(job.script).is_file()
    assert job.arguments == ["--config", f"runs/bf16-seed11/{START}"]
    # the same command: the failed one alone; a job that is still there is waited for, not doubled
    assert states(swept(*command, launcher="slurm")) == ["finished", "finished", "failed"]
    assert len(cluster.jobs) == 4
    cluster.queue["4"] = cluster.jobs[-1]
    assert Path("runs/bf16-seed13", JOB).read_text() == "4\n"
    swept(*command, launcher="slurm")
    assert len(cluster.jobs) == 4


def test_a_job_that_is_warned_saves_and_is_queued_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """submitit calls ``checkpoint`` from a signal's handler, while the job waits for its processes."""
    script = tmp_path / "torchrun.sh"
    script.write_text(
        "trap 'echo saved >> saved; exit 0' TERM\n"
        'echo "$NNODES $NODE_RANK $NPROC_PER_NODE $MASTER_ADDR $*" > told\nwhile :; do sleep 0.1; done\n'
    )
    queued: list[slurm.Job] = []

    class Left(Exception):
        """What submitit's handler ends with."""

    stand_in = types.SimpleNamespace(
        JobEnvironment=lambda: types.SimpleNamespace(
            num_nodes=2, node=1, hostnames=["gpu03", "gpu04"], raw_job_id="17"
        ),
        helpers=types.SimpleNamespace(DelayedSubmission=queued.append),
    )
    monkeypatch.setitem(sys.modules, "submitit", stand_in)
    job = slurm.Job(str(script), ["--config", "a"], 4, str(tmp_path))

    def warned(number: int, frame: Any) -> None:
        job.checkpoint()
        raise Left

    before = signal.signal(signal.SIGALRM, warned)
    signal.setitimer(signal.ITIMER_REAL, 1.5)
    try:
        with pytest.raises(Left):
            job()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert (tmp_path / "saved").read_text() == "saved\n"
    assert (tmp_path / "told").read_text() == "2 1 4 gpu03 --config a\n"
    assert queued == [job]


def test_slurm_without_submitit_or_without_slurm_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(UserError, match=r"^sweep\.launcher: slurm needs submitit; pip install"):
        swept("seed=1,2", launcher="slurm")
    monkeypatch.setitem(sys.modules, "submitit", types.SimpleNamespace(AutoExecutor=None))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(UserError, match=r"^sweep\.launcher: slurm needs sbatch, which is not here"):
        swept("seed=1,2", launcher="slurm")


def test_a_job_is_in_the_queue_while_slurm_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text(
        '#!/bin/sh\ncase "$5" in\n  *3*) echo "slurm_load_jobs: Invalid job id specified" >&2; exit 1;;\n'
        '  *9*) echo "error: Unable to contact slurm controller" >&2; exit 1;;\n  *) echo 1;;\nesac\n'
    )
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert slurm.in_queue([]) == set()
    assert slurm.in_queue(["1", "2"]) == {"1"}
    assert slurm.in_queue(["1", "3"]) == {"1"}
    assert slurm.in_queue(["9"]) == {"9"}
