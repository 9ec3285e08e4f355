"""Overrides that only set keys are applied to what Hydra composed once for the chosen options."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from fp4pretrain.config import compose, composing, schema_keys
from fp4pretrain.overrides import adding_rules
from fp4pretrain.presets import config_dir, own

# A key, a section as a dict, a list, a map of a rule's, an interpolation; the options before and after them.
COMMANDS = [
    ["train.steps=7", "precision=fp8", "model={num_layers: 3}", "logging.wandb.tags=[a,b]"],
    ["experiment=fc2_mixed", "precision.rules.fc2_y.start=0.5", "precision.rules.more.recipe=bf16"],
    ["model=gpt_30m", "data.seed=${seed}", "optim=cosine", "optim.lr=1e-3", "optim.lr=2e-3"],
    ["data.path={a: {prefix: x, weight: 0.5}}", "data.valid=null", "parallel.tensor=2"],
]


def _by_hydra_alone(overrides: list[str]) -> dict[str, Any]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        whole = hydra_compose("train", overrides=adding_rules(overrides))
    plain = OmegaConf.to_container(whole, resolve=True)
    merged = OmegaConf.to_container(OmegaConf.merge(composing._schema(), plain))
    assert isinstance(merged, dict)
    return {str(key): value for key, value in merged.items()}


@pytest.mark.parametrize("overrides", COMMANDS, ids=lambda overrides: overrides[0])
def test_a_command_line_is_what_hydra_makes_of_all_of_it(overrides: list[str]) -> None:
    composed, _ = composing._composed(tuple(overrides), schema_keys(), own())
    assert OmegaConf.to_container(composed) == _by_hydra_alone(overrides)


def test_what_one_command_line_sets_no_other_sees() -> None:
    before = asdict(compose(["precision=nvfp4"]))
    composing._composed.cache_clear()
    compose(
        [
            "precision=nvfp4",
            "train.steps=7",
            "precision.rules.a.recipe=fp8",
            "logging.wandb.tags=[a]",
        ]
    )
    assert asdict(compose(["precision=nvfp4"])) == before
