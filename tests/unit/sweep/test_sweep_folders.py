"""Which runs a command makes, and in which folders: nothing is trained here."""

from __future__ import annotations

from pathlib import Path

import pytest

from fp4pretrain import presets
from fp4pretrain.config import RunConfig
from fp4pretrain.errors import UserError
from fp4pretrain.overrides import expand_sweep
from fp4pretrain.sweep import engine, planning, train_all
from fp4pretrain.train.run_dir import run_path

H16 = ["precision=mxfp4_h16"]
# The command -> the folders trained, in order.
FOLDERS = [
    ([], ["runs/nvfp4-seed1234"]),
    (["name=a"], ["runs/a"]),
    (["run_dir=b/a"], ["b/a"]),
    (["precision=bf16,fp8"], ["runs/bf16-seed1234", "runs/fp8-seed1234"]),
    (["precision=bf16", "seed=1,2"], ["runs/bf16-seed1", "runs/bf16-seed2"]),
    (["optim.lr=1e-3,0.1"], ["runs/nvfp4-seed1234-lr_0.001", "runs/nvfp4-seed1234-lr_0.1"]),
    (
        [*H16, "precision.wgrad.rotation.kind=none,hadamard"],
        ["runs/mxfp4_h16-wgrad.rotation.kind_none-seed1234", "runs/mxfp4_h16-seed1234"],
    ),
    (["name=a", "precision=bf16,fp8"], ["runs/a-precision_bf16", "runs/a-precision_fp8"]),
    (["name=a,b"], ["runs/a", "runs/b"]),
    (["run_dir=x/a,x/b"], ["x/a", "x/b"]),
    (
        ["data.split='9,1','8,2'"],
        ["runs/nvfp4-seed1234-data.split_9_1", "runs/nvfp4-seed1234-data.split_8_2"],
    ),
    (["baseline=fp8"], ["runs/fp8-seed1234", "runs/nvfp4-seed1234"]),
    (["baseline=fp8", "run_dir=runs/demo"], ["runs/demo-fp8", "runs/demo-nvfp4"]),
    # one baseline serves the recipes of a sweep; each seed has its own
    (
        ["baseline=fp8", "precision=nvfp4,mxfp4_h16"],
        ["runs/fp8-seed1234", "runs/nvfp4-seed1234", "runs/mxfp4_h16-seed1234"],
    ),
    (
        ["baseline=fp8", "seed=1,2"],
        ["runs/fp8-seed1", "runs/nvfp4-seed1", "runs/fp8-seed2", "runs/nvfp4-seed2"],
    ),
    (
        ["baseline=fp8", "precision.wgrad.rotation.kind=none,hadamard", "name=d"],
        [
            "runs/d-fp8",
            "runs/d-nvfp4-wgrad.rotation.kind_none",
            "runs/d-nvfp4-wgrad.rotation.kind_hadamard",
        ],
    ),
    # keys that end alike are told apart
    (
        [
            "name=a",
            "precision.fprop.x.rounding=nearest,stochastic",
            "precision.fprop.w.rounding=nearest",
        ],
        ["runs/a-fprop.x.rounding_nearest", "runs/a-fprop.x.rounding_stochastic"],
    ),
    (["data.seed=1,2"], ["runs/nvfp4-seed1234-data.seed_1", "runs/nvfp4-seed1234-data.seed_2"]),
    # a variant of a recipe says so, also where nothing is swept
    (
        ["precision.wgrad.rotation.kind=none", "seed=1"],
        ["runs/nvfp4-wgrad.rotation.kind_none-seed1"],
    ),
    (["precision.keep.last_blocks=2"], ["runs/nvfp4-last_blocks_2-seed1234"]),
    (["precision.name=mine", "precision.keep.last_blocks=2"], ["runs/mine-seed1234"]),
    (
        ["experiment=late_switch", "precision.tail.at=0.9"],
        ["runs/nvfp4-seed1234", "runs/nvfp4_late-at_0.9-seed1234"],
    ),
    (
        ["experiment=quartet2_30m"],
        ["runs/bf16-seed1234", "runs/nvfp4-first_blocks_0-last_blocks_0-seed1234"],
    ),
    (["experiment=late_switch"], ["runs/nvfp4-seed1234", "runs/nvfp4_late-seed1234"]),
]


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[RunConfig]:
    """The configs that would be trained."""
    configs: list[RunConfig] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine, "train", lambda config, *, until: configs.append(config))
    monkeypatch.setattr(planning, "check_run", lambda config, *, elsewhere: None)
    monkeypatch.setattr(engine, "report", lambda outcomes, *, page: None)
    return configs


@pytest.mark.parametrize(("overrides", "folders"), FOLDERS)
def test_each_run_has_a_folder_named_by_what_is_swept(
    trained: list[RunConfig], overrides: list[str], folders: list[str]
) -> None:
    outcomes = train_all(expand_sweep(overrides))
    assert [str(run_path(run)) for run in trained] == folders
    assert [(str(one.run and one.run.path), one.state) for one in outcomes] == [
        (folder, "finished") for folder in folders
    ]


def test_combinations_with_folders_of_their_own_keep_them(trained: list[RunConfig]) -> None:
    """As a script gives them, whatever else they vary; two of one folder are refused."""
    runs = [["precision=bf16", "seed=1", "run_dir=x/a"], ["precision=fp8", "seed=2", "run_dir=x/b"]]
    train_all(runs)
    assert [str(run_path(run)) for run in trained] == ["x/a", "x/b"]
    train_all([[*one, "run_dir=x/c"] for one in runs])
    assert len({run_path(run) for run in trained}) == 4


def test_a_rule_that_waits_for_the_gap_is_not_trained_without_its_baseline(
    trained: list[RunConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The baseline failed: the rule could never fire."""

    def fails(config: RunConfig, *, until: float | None) -> None:
        trained.append(config)
        raise UserError("no")

    monkeypatch.setattr(engine, "train", fails)
    late = ["precision.rules.late.recipe=bf16", "precision.rules.late.trigger='gap > 0.02'"]
    base, run = train_all([["baseline=fp8", *late]])
    assert [one.precision.name for one in trained] == ["fp8"]
    assert (base.state, run.state) == ("failed", "failed")
    assert run.line.startswith("precision.rules.late.trigger: it waits for the gap to runs/fp8-")


def test_a_baseline_is_the_same_run_in_its_own_recipe(trained: list[RunConfig]) -> None:
    command = ["experiment=late_switch", "baseline=fp8", "train.steps=9", "seed=5"]
    train_all([command])
    base, run = trained
    assert (base.train, base.seed, base.model, base.optim) == (
        *(run.train, run.seed, run.model, run.optim),
    )
    assert base.precision.tail.at is None  # the switch is the run's, not its baseline's
    assert run.precision.tail.at == 0.82
    assert base.precision.fprop.x.format == "fp8_e4m3"


def test_nothing_is_trained_where_one_run_of_a_sweep_is_taken(trained: list[RunConfig]) -> None:
    taken = Path("runs/fp8-seed1234/checkpoints")
    taken.mkdir(parents=True)
    with pytest.raises(UserError, match=r"^run_dir: runs/fp8-seed1234 exists already"):
        train_all(expand_sweep(["precision=bf16,fp8"]))
    assert trained == []


def test_two_recipes_never_share_a_name(trained: list[RunConfig]) -> None:
    """Every value of every key of a sweep, also where keys have a last name in common."""
    command = [
        "precision.dgrad.dy.rounding=nearest,stochastic",
        "precision.wgrad.dy.rounding=nearest,stochastic",
        "precision.fprop.rotation.kind=none,hadamard",
    ]
    train_all(expand_sweep(command))
    assert len({str(run_path(run)) for run in trained}) == 8


def test_a_recipe_without_a_name_is_called_by_its_file(
    trained: list[RunConfig], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In a folder of the user's, laid out like ours."""
    monkeypatch.setattr(presets, "_own", presets._Own())
    (tmp_path / "own/precision").mkdir(parents=True)
    for name, text in (("mine", ""), ("called", "name: theirs\n")):
        recipe = f"defaults: [nvfp4, _self_]\n{text}keep: {{last_blocks: 2}}\n"
        (tmp_path / "own/precision" / f"{name}.yaml").write_text(recipe)
    presets.use_folder(tmp_path / "own")
    for name, folder in (("mine", "runs/mine-seed1234"), ("called", "runs/theirs-seed1234")):
        train_all([[f"precision={name}"]])
        assert str(run_path(trained[-1])) == folder
    train_all([["precision=mine", "precision.keep.first_blocks=1"]])
    assert str(run_path(trained[-1])) == "runs/mine-first_blocks_1-seed1234"


def test_the_plan_decides_whether_a_baseline_is_another_recipe(trained: list[RunConfig]) -> None:
    for same in (["baseline=nvfp4"], ["baseline=nvfp4", "precision.name=other"]):
        with pytest.raises(UserError, match=r"^baseline: nvfp4 is the run's own recipe"):
            train_all([same])
    train_all([["baseline=nvfp4", "precision.keep.last_blocks=2"]])
    assert [one.precision.name for one in trained] == ["nvfp4", "nvfp4-last_blocks_2"]
