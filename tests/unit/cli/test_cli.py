"""The command line: one line and status 2 for a user's mistake, and nothing on disk touched.

One tiny run is trained in a process of its own; what is refused is refused before any rank works,
so those commands run in this process.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from fp4pretrain import cli, data, presets
from fp4pretrain.config import RunConfig
from fp4pretrain.errors import UserError
from fp4pretrain.parallel import groups
from fp4pretrain.sweep import engine

ROOT = Path(__file__).resolve().parents[3]
TINY = [
    *("model.num_layers=2", "model.hidden_size=64", "model.num_attention_heads=2"),
    *("model.num_query_groups=2", "model.ffn_hidden_size=128", "model.seq_length=64"),
    *("train.micro_batch=1", "train.global_batch=2", "train.steps=2", "data.valid_tokens=256"),
    *("data=mock", "logging=quiet", "parallel.device=cpu"),
]


@pytest.fixture(autouse=True)
def _own_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests of this process may hold process groups: leave them theirs."""
    monkeypatch.setattr(groups, "leave", lambda *, destroy=False: None)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def _process(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, "-m", "fp4pretrain", *arguments],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    done = _process(["train", *TINY, f"run_dir={folder}"])
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to damage."""
    return shutil.copytree(trained, tmp_path / "run")


def _refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that exits with 2."""
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    told = capsys.readouterr()
    assert caught.value.code == 2
    assert told.out == ""
    assert told.err.startswith("fp4pretrain: ")
    assert told.err.count("\n") == 1
    return told.err.removeprefix("fp4pretrain: ").rstrip("\n")


def _contents(folder: Path) -> dict[str, tuple[str, int]]:
    """Digest and time of every file below a folder."""
    return {
        str(path.relative_to(folder)): (
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_mtime_ns,
        )
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_a_run_leaves_its_files(trained: Path) -> None:
    assert {"config.yaml", "plan.txt", "metrics.jsonl", "checkpoints/latest"} <= set(
        _contents(trained)
    )
    assert yaml.safe_load((trained / "config.yaml").read_text())["train"]["steps"] == 2


def test_the_program_exits_with_2_after_one_line(trained: Path) -> None:
    """As a user meets it, in a process: an existing run without resume."""
    before = _contents(trained)
    done = _process(["train", *TINY, f"run_dir={trained}"])
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(
        r"fp4pretrain: run_dir: \S+ exists already; continue it with resume=auto.*\n", done.stderr
    )
    assert _contents(trained) == before


# What is wrong with a run's folder or checkpoint -> overrides ({run}: the run), pattern of the line.
FOLDERS = [
    ([], r"run_dir: .* exists already; continue it with resume=auto"),
    (["resume=auto", "model.ffn_hidden_size=256"], r"resume: .*ffn_hidden_size is 128 .* 256 here"),
    (
        ["resume=auto", "model.tie_embeddings=true"],
        r"resume: .*tie_embeddings is False .* set model",
    ),
    (
        ["resume=auto", "optim.params_dtype=fp32"],
        r"resume_with: .*dtype=bf16, and here it is fp32",
    ),
    (["resume={run}/plan.txt"], r"resume: .* is no checkpoint; give auto"),
    (["resume={run}/nowhere"], r"resume: .* is no checkpoint"),
    (["resume={run}/checkpoints/step_00000009"], r"resume: .* is no checkpoint"),
]


@pytest.mark.parametrize(("overrides", "pattern"), FOLDERS)
def test_a_runs_folder_is_never_overwritten(
    run: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], pattern: str
) -> None:
    before = _contents(run)
    given = [text.format(run=run) for text in overrides]
    line = _refused(capsys, "train", *TINY, f"run_dir={run}", *given)
    assert re.match(pattern, line)
    assert _contents(run) == before


def test_a_checkpoint_of_another_run_is_not_continued_in_this_ones_folder(
    run: Path, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = _contents(run)
    line = _refused(capsys, "train", *TINY, f"run_dir={run}", f"resume={trained}")
    assert re.match(r"run_dir: .* exists already; choose another run_dir", line)
    assert _contents(run) == before


def test_a_folder_of_other_files_is_not_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text("mine: 1\n")
    for resume in ([], ["resume=auto"]):
        line = _refused(capsys, "train", *TINY, f"run_dir={tmp_path}", *resume)
        assert re.match(r"run_dir: .* holds other files than a run's; choose another", line)
    assert (tmp_path / "config.yaml").read_text() == "mine: 1\n"


DAMAGE = {
    "run.json": [
        b"",
        b"{",
        b"[]",
        b"[1]",
        b"null",
        b"{}",
        b'{"step": "2", "model": {}}',
        b"\xff\xfe",
    ],
    "manifest.json": [None, b"", b"{}", b"[]", b"\xff"],
    "rank_00000.safetensors": [None, b"", b"short"],
}


@pytest.mark.parametrize(("file", "content"), [(f, c) for f, cs in DAMAGE.items() for c in cs])
def test_a_damaged_checkpoint_is_one_line(
    run: Path, capsys: pytest.CaptureFixture[str], file: str, content: bytes | None
) -> None:
    path = run / "checkpoints" / "step_00000002" / file
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    line = _refused(capsys, "train", *TINY, f"run_dir={run}", "resume=auto")
    assert re.match(rf"resume: .* is damaged \({re.escape(file)}: .*resume from another", line)


def test_a_checkpoint_lost_after_latest_named_it_is_one_line(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "checkpoints" / "step_00000002")
    line = _refused(capsys, "train", *TINY, f"run_dir={run}", "resume=auto")
    assert re.match(r"resume: .*step_00000002 is damaged", line)


def test_a_run_dir_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for place, pattern in (
        (file, r"run_dir: \S+/file is a file; choose another run_dir"),
        (file / "below" / "it", r"run_dir: \S+/file is a file"),
        (tmp_path / ("x" * 300), r"run_dir: .*cannot be written \(File name too long\); choose"),
    ):
        assert re.match(pattern, _refused(capsys, "train", *TINY, f"run_dir={place}"))
    assert file.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [file]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An indexed dataset of 40 documents of bytes."""
    folder = tmp_path_factory.mktemp("data")
    lines = [json.dumps({"text": f"{i} times a sentence. " * 50}) for i in range(40)]
    (folder / "text.jsonl").write_text("\n".join(lines))
    data.prepare_text([folder / "text.jsonl"], folder / "text")
    return folder / "text"


DATASETS = [
    ("data.path={prefix}", r"data\.path: .*text\.bin has .* bytes where its index says .*again"),
    ("data.path={{a: {{prefix: {prefix}}}}}", r"data\.path\.a: .*text\.bin has .*build or copy"),
    ("data.path={prefix}s", r"data\.path: .*texts\.idx is missing; give a prefix"),
    ("data.path={prefix}.bin", r"data\.path: .*text\.bin\.idx is missing; give a prefix \(no"),
    ("data.path={{}}", r"data\.path: the blend is empty; name"),
    ("data.path={{a: {prefix}}}", r"data\.path\.a: needs a prefix; write"),
    (
        "data.path={{a: {{prefix: {prefix}, weight: nan}}}}",
        r"data\.path\.a\.weight: nan .*positive",
    ),
    ("data.split=nine", r"data\.split: 'nine' .*write training"),
    ("data.tokenizer=morse", r"data\.tokenizer: unknown tokenizer 'morse'; give byte"),
    ("model.vocab_size=100", r"model\.vocab_size: 100 .*set model\.vocab_size=257"),
]


@pytest.mark.parametrize(("override", "pattern"), DATASETS)
def test_a_truncated_missing_or_misnamed_dataset_is_one_line(
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    override: str,
    pattern: str,
) -> None:
    for suffix in (".idx", ".bin", ".json"):
        shutil.copy(f"{dataset}{suffix}", tmp_path)
    with open(tmp_path / "text.bin", "r+b") as stream:
        stream.truncate(1000)
    given = [
        *TINY,
        "data=stdlib",
        f"data.cache_dir={tmp_path / 'cache'}",
        f"run_dir={tmp_path / 'r'}",
    ]
    line = _refused(capsys, "train", *given, override.format(prefix=tmp_path / "text"))
    assert re.match(pattern, line)
    assert not (tmp_path / "r").exists()


COMMANDS = [
    ((), r"the following arguments are required: VERB; see fp4pretrain --help"),
    (("trian",), r"argument VERB: invalid choice: 'trian'.*--help"),
    (("train", "--steps=3"), r"--steps=3: no such option; keys are set as key=value"),
    (("train", "modle=tiny"), r"modle: no such key; did you mean model\?"),
    (("train", "seed=1,2"), r"seed: 1,2 is several values; sweep"),
    (("train", "--cfg", "train.steps=0"), r"train\.steps: 0 is out of range"),
    (("train", "-m", "seed=1,2", "model=nope"), r"model: 'nope' is unknown"),
    (
        ("train", "baseline=nvfp5"),
        r"baseline: 'nvfp5' is no recipe and no run's folder; choose .*fp8",
    ),
    (("train", "precision=fp8", "baseline=fp8"), r"baseline: fp8 is the run's own recipe; choose"),
    (("train", "baseline=fp8", "resume=some/run"), r"resume: some/run cannot be both"),
    (("train", "parallel.tensor=2"), r"parallel\.tensor x parallel\.pipeline: .*start a multiple"),
    (
        ("train", "-m", "precision=fp8,nvfp4", "precision.name=x"),
        r"run_dir: two runs .*x-seed1234; ",
    ),
    (("train", "-m", "optim.lr=1,2", "train.steps=0"), r"train\.steps: "),
    (("compare", "nowhere", "nothere"), r"nowhere: no such run"),
    (("compare",), r"the following arguments are required: RUN_DIR"),
    (("data", "inspect", "nowhere"), r"prefix: nowhere\.idx is missing"),
    (("data", "build", "nowhere", "--out", "x"), r"inputs: nowhere does not exist; give"),
    (
        ("data", "train-bpe", "stdlib", "--out", "x", "--vocab-size", "many"),
        r".*invalid int.*--help",
    ),
]


@pytest.mark.parametrize(("arguments", "pattern"), COMMANDS)
def test_a_bad_command_is_one_line(
    arguments: tuple[str, ...],
    pattern: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert re.match(pattern, _refused(capsys, *arguments))
    assert list(tmp_path.iterdir()) == []


def test_only_the_main_rank_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as caught:
        cli.main(["data", "inspect", "nowhere"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == ""


def test_a_folder_of_the_users_own_is_searched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presets, "_own", presets._Own())
    (tmp_path / "precision").mkdir()
    (tmp_path / "precision/mine.yaml").write_text("defaults: [fp8, _self_]\n")
    cli.main(["train", "--cfg", "--config-dir", str(tmp_path), "precision=mine"])
    assert yaml.safe_load(capsys.readouterr().out)["precision"]["name"] == "mine"
    line = _refused(capsys, "audit", "--config-dir", str(tmp_path / "precision"))
    assert line.startswith("config-dir: ")


def test_launch_writes_the_scripts_that_the_package_brings(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["launch", "--print", "slurm"])
    assert capsys.readouterr().out == (ROOT / "launch/slurm.sbatch").read_text()
    for _ in range(2):  # the same again is no conflict
        cli.main(["launch", "--out", str(tmp_path / "a/launch")])
    for name in ("torchrun.sh", "slurm.sbatch"):
        made = tmp_path / "a/launch" / name
        assert made.read_bytes() == (ROOT / "launch" / name).read_bytes()
        assert os.access(made, os.X_OK)
    capsys.readouterr()
    made.write_text("mine")
    line = _refused(capsys, "launch", "--out", str(made.parent))
    assert re.match(r"out: .*slurm\.sbatch says something else; move it", line)
    assert made.read_text() == "mine"


def test_a_sweep_with_a_failed_run_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)

    def fails(config: RunConfig, *, until: float | None) -> None:
        if config.seed == 1:
            raise UserError("no")

    monkeypatch.setattr(engine, "train", fails)
    with pytest.raises(SystemExit) as caught:
        cli.main(["train", "-m", *TINY, "seed=1,2"])
    assert caught.value.code == 1
    cli.main(["train", "-m", *TINY, "seed=3,4"])


def test_a_finished_run_that_is_resumed_says_so(trained: Path) -> None:
    before = (trained / "metrics.jsonl").read_text()
    said = _process(["train", *TINY, f"run_dir={trained}", "resume=auto"]).stdout
    assert f"{trained} is finished: step 2 of train.steps=2; nothing is left to train" in said
    assert (trained / "metrics.jsonl").read_text() == before


def test_a_run_without_its_checkpoints_begins_again_only_when_asked(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    line = _refused(capsys, "train", *TINY, f"run_dir={run}", "resume=restart")
    assert re.match(r"resume: .* has checkpoints, which restart would leave behind", line)
    shutil.rmtree(run / "checkpoints")
    rows = (run / "metrics.jsonl").read_text()
    line = _refused(capsys, "train", *TINY, f"run_dir={run}", "resume=auto")
    assert re.match(r"resume: .* has rows in .* but no checkpoint .* resume=restart", line)
    assert (run / "metrics.jsonl").read_text() == rows
    said = _process(["train", *TINY, f"run_dir={run}", "resume=restart"]).stdout
    assert "starting at step 1; the rows of the earlier attempt are kept" in said
    assert (run / "metrics.1.jsonl").read_text() == rows
    steps = [json.loads(one)["step"] for one in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 2]


def test_a_run_that_ended_before_its_first_checkpoint_begins_again_by_itself(
    trained: Path, tmp_path: Path
) -> None:
    """As a launcher's restart needs it."""
    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("checkpoints", ".lock"))
    history = json.loads((run / "history.json").read_text()) | {"saved_step": None}
    (run / "history.json").write_text(json.dumps(history))
    said = _process(["train", *TINY, f"run_dir={run}", "resume=auto"]).stdout
    assert "starting at step 1" in said
    assert (run / "metrics.1.jsonl").is_file()


def test_a_run_folder_says_what_it_is_of(trained: Path) -> None:
    fingerprint = json.loads((trained / "fingerprint.json").read_text())
    assert fingerprint["seeds"] == {"seed": 1234, "data.seed": 1234}
    (start,) = json.loads((trained / "history.json").read_text())["starts"]
    assert (start["fingerprint"], sum(start["devices"].values())) == (fingerprint["digest"], 1)
    assert not (trained / ".lock").exists()
