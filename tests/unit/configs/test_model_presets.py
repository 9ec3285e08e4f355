"""Every model preset is complete, divides as its GEMMs need, and states its size truly."""

from __future__ import annotations

import dataclasses
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from fp4pretrain.config import ModelConfig, compose

FOLDER = Path(__file__).resolve().parents[3] / "configs" / "model"
PRESETS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
# Model: blocks, hidden, query heads, groups, sequence length, as the papers state them.
PUBLISHED = {
    "gpt_30m": (6, 640, 5, 5, 512),
    "gpt_50m": (7, 768, 6, 6, 512),
    "gpt_100m": (8, 1024, 8, 8, 512),
    "gpt_200m": (10, 1280, 10, 10, 512),
    "gpt_345m": (24, 1024, 16, 16, 1024),
    "gpt_1_3b": (24, 2048, 16, 16, 2048),
    "gpt_6_7b": (32, 4096, 32, 32, 2048),
    "gpt_1_2b": (20, 2048, 16, 8, 8192),
    "gpt_8b": (32, 4096, 32, 4, 8192),
    "llama3_8b": (32, 4096, 32, 8, 8192),
}
# What the model is called after counts the linears of its blocks there, not its embeddings.
WITHOUT_EMBEDDINGS = {"gpt_30m": 30e6, "gpt_50m": 50e6, "gpt_100m": 100e6, "gpt_200m": 200e6}


@cache
def _model(name: str) -> ModelConfig:
    return compose([f"model={name}"]).model


def _linears(model: ModelConfig) -> list[tuple[int, int]]:
    """(in, out) of a block's four linears."""
    head = model.kv_channels or model.hidden_size // model.num_attention_heads
    heads = model.num_attention_heads
    groups = model.num_query_groups or heads
    up = 2 if model.activation == "swiglu" else 1
    return [
        (model.hidden_size, (heads + 2 * groups) * head),
        (heads * head, model.hidden_size),
        (model.hidden_size, up * model.ffn_hidden_size),
        (model.ffn_hidden_size, model.hidden_size),
    ]


def _parameters(model: ModelConfig) -> int:
    linears = _linears(model)
    norm = model.hidden_size * (2 if model.normalization == "layernorm" else 1)
    block = sum(k * n for k, n in linears) + 2 * norm
    block += sum(n for _, n in linears) if model.bias else 0
    embedding = model.vocab_size * model.hidden_size
    positions = model.seq_length * model.hidden_size if model.position == "learned" else 0
    copies = 1 if model.tie_embeddings else 2
    return model.num_layers * block + norm + copies * embedding + positions


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_composes_and_its_first_line_states_its_parameters(name: str) -> None:
    first = (FOLDER / f"{name}.yaml").read_text().splitlines()[0]
    stated = re.search(r"([\d.]+)M parameters", first)
    assert first.startswith("# ")
    assert stated, f"{name}.yaml: its first line does not state its parameters"
    assert float(stated[1]) == pytest.approx(_parameters(_model(name)) / 1e6, abs=0.05)


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_published_preset_spells_out_every_key_and_is_the_papers_model(name: str) -> None:
    tree: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert tree.pop("defaults") == ["schema", "_self_"]
    assert set(tree) == {field.name for field in dataclasses.fields(ModelConfig)}
    model = _model(name)
    found = (
        model.num_layers,
        model.hidden_size,
        model.num_attention_heads,
        model.num_query_groups or model.num_attention_heads,
        model.seq_length,
    )
    assert found == PUBLISHED[name]
    if name in WITHOUT_EMBEDDINGS:
        blocks = model.num_layers * sum(k * n for k, n in _linears(model))
        assert blocks == pytest.approx(WITHOUT_EMBEDDINGS[name], rel=0.03)


@pytest.mark.parametrize("name", PRESETS)
def test_every_gemm_dimension_is_made_of_whole_blocks_and_rotations(name: str) -> None:
    """128 is the largest block and rotation that a recipe uses (fp8 1x128, MS-EDEN)."""
    model = _model(name)
    assert all(size % 128 == 0 for pair in _linears(model) for size in pair)
    assert model.seq_length % 128 == 0
