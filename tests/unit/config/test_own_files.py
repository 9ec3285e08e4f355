"""Recipes, models and experiments of the user's own: single files, and a folder laid out like ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf

from fp4pretrain import presets
from fp4pretrain.config import compose, plan_of
from fp4pretrain.errors import UserError
from fp4pretrain.fingerprint import entries, plan_digest
from fp4pretrain.stored import composed, read_config


@pytest.fixture(autouse=True)
def own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The user's folder, where commands are called."""
    monkeypatch.setattr(presets, "_own", presets._Own())
    monkeypatch.chdir(tmp_path)
    for name, text in {
        "my/recipe.yaml": "defaults: [base, _self_]\nkeep: {first_blocks: 1, last_blocks: 1}\n",
        "my/base.yaml": "defaults: [nvfp4, _self_]\nfprop: {x: {scale: four_over_six}}\n",
        "my/nvfp4.yaml": "defaults: [mxfp8, _self_]\n",
        "my/small.yaml": "defaults: [schema, _self_]\nnum_layers: 7\n",
        "my/study.yaml": "# @package _global_\ndefaults: [{override /precision: fp8}]\nseed: 8\n",
        "theirs/precision/nvfp4.yaml": "defaults: [mxfp8, _self_]\nname: nvfp4\n",
        "theirs/precision/other.yaml": "defaults: [nvfp4, _self_]\nkeep: {last_blocks: 1}\n",
        "theirs/precision/loop.yaml": "defaults: [loop, _self_]\n",
        "theirs/optim/warm.yaml": "defaults: [schema, _self_]\nlr: 0.5\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_file_is_an_option_of_any_group_and_may_name_its_neighbours(own: Path) -> None:
    config = compose(["precision=my/recipe.yaml", f"model={own}/my/small.yaml"])
    assert config.precision.name == "recipe"  # what the run is called
    assert config.precision.fprop.x.scale == "four_over_six"
    assert config.precision.keep.last_blocks == 1
    assert config.precision.dgrad.dy.rounding == "stochastic"  # of our nvfp4
    assert config.model.num_layers == 7
    assert compose(["precision=recipe"]).precision.name == "recipe"
    study = compose(["experiment=my/study.yaml"])
    assert (study.seed, study.precision.fprop.x.format) == (8, "fp8_e4m3")
    changed = compose(["precision=my/recipe.yaml", "precision.keep.last_blocks=2"])
    assert changed.precision.name == "recipe-last_blocks_2"


def test_a_folder_is_searched_before_ours(own: Path) -> None:
    presets.use_folder(own / "theirs")
    config = compose(["precision=other", "optim=warm"])
    assert config.precision.fprop.x.format == "mxfp8"
    assert config.optim.lr == 0.5
    assert compose(["precision=bf16"]).precision.fprop.x.format == "bf16"


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("precision=my/none.yaml", r"precision: .*my/none\.yaml is no file; give the path"),
        (
            "precision=my/nvfp4.yaml",
            r"precision: .*has the name of precision=nvfp4, which is there",
        ),
        ("precision=my/recipe", r"precision: 'my/recipe' is unknown"),
        ("baseline=my/none.yaml", r"precision: .*is no file"),
    ],
)
def test_a_file_that_is_none_is_one_line(override: str, line: str) -> None:
    with pytest.raises(UserError, match=f"^{line}"):
        compose([override])


def test_a_broken_file_is_named_where_it_lies(own: Path) -> None:
    (own / "my/broken.yaml").write_text("fprop: {x: {format: nvfp4\n")
    with pytest.raises(UserError, match=rf"^{own}/my/broken\.yaml, line 2: "):
        compose(["precision=my/broken.yaml"])


def test_a_folder_that_is_none_is_one_line(own: Path) -> None:
    for folder in ("nowhere", "my"):
        with pytest.raises(UserError, match=rf"^config-dir: {folder} (is no folder|holds none)"):
            presets.use_folder(Path(folder))
    presets.use_folder(own / "theirs")
    with pytest.raises(UserError, match=r"^precision=loop: the defaults of a file lead back to it"):
        compose(["precision=loop"])


def test_a_stored_config_needs_the_files_no_more(
    own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--config runs/a/config.yaml``: the same run, and of its keys those that are no recipe's."""
    rule = ["precision.rules.a.recipe=fp8", "precision.rules.a.linears=[fc2]"]
    config = compose(["precision=my/recipe.yaml", "train.tokens=1M", *rule])
    folder = own / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.structured(config)))
    monkeypatch.setattr(presets, "_own", presets._Own())
    (own / "my/recipe.yaml").unlink()
    again = composed([], folder / "config.yaml")
    assert entries(again) == entries(config)
    assert plan_digest(again, plan_of(again)) == plan_digest(config, plan_of(config))
    assert again == read_config(folder)
    longer = composed(["resume=auto", "train.steps=9", "name='a b'"], folder / "config.yaml")
    assert (longer.resume, longer.train.steps, longer.name) == ("auto", 9, "a b")
    for override, line in (
        ("precision=fp8", r"precision: .*config\.yaml says it already"),
        ("precision.keep.last_blocks=2", r"precision\.keep\.last_blocks: .*says it already"),
        ("train.steps=many", r"train\.steps: .*whole number"),
        ("trian.steps=3", r"trian\.steps: no such key"),
    ):
        with pytest.raises(UserError, match=f"^{line}"):
            composed([override], folder / "config.yaml")
    assert yaml.safe_load((folder / "config.yaml").read_text())["precision"]["name"] == (
        "recipe-recipe_fp8-linears_fc2"
    )
