"""A Hugging Face model as a start: what was exported comes back bit for bit, transformers' own models
compute their logits here, and a folder of another kind is one line with what to set."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fp4pretrain.cli import main
from fp4pretrain.config import compose
from fp4pretrain.convert import Export, export_hf
from fp4pretrain.errors import UserError
from fp4pretrain.model.layout import check_layout
from fp4pretrain.parallel.groups import join, leave, pick_device
from fp4pretrain.train.initial import check_initial, load_initial
from fp4pretrain.train.stored import stored_run
from fp4pretrain.train.trainer import Trainer, build_trainer, unwrapped

FP32 = "optim.params_dtype=fp32"
MODELS = [
    ["model.num_query_groups=2", "model.vocab_size=300"],
    ["model.qk_norm=true", "model.tie_embeddings=true"],
    ["model=gpt_1_2b", "model.num_query_groups=2", "model.bias=true"],
    ["model=gpt_345m"],
]


def _fresh(small: list[str], *overrides: str) -> Trainer:
    config = compose([*small, "precision=bf16", *overrides])
    world = join(device=pick_device("cpu"), seed=config.seed)
    return build_trainer(config, world, check_layout(config, 1))


def _weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in unwrapped(trainer.chunks[0]).named_parameters()}


@pytest.mark.parametrize("model", MODELS, ids=",".join)
def test_what_was_exported_comes_back(
    trained: Any, small: list[str], tmp_path: Path, model: list[str]
) -> None:
    """BF16 weights as they were but for the rows that pad the vocabulary, and masters that are theirs."""
    first, run = trained(*model)
    expected = _weights(first)
    export_hf(stored_run(run), tmp_path / "hf")
    leave()
    trainer = _fresh(small, *model)
    before = _weights(trainer)
    load_initial(trainer, str(tmp_path / "hf"))
    found = _weights(trainer)
    assert found.keys() == expected.keys()
    vocabulary = trainer.config.model.vocab_size
    for name, tensor in expected.items():
        if "word_embeddings" in name or "output_layer" in name:
            assert not found[name][vocabulary:].any()
            tensor, found[name] = tensor[:vocabulary], found[name][:vocabulary]
        assert torch.equal(found[name], tensor), name
        assert not torch.equal(before[name][: len(tensor)], tensor)
    for part in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer]):
        for narrow, wide in zip(part.float16_groups, part.fp32_from_float16_groups, strict=True):
            for parameter, master in zip(narrow, wide, strict=True):
                assert torch.equal(master, parameter.float())


def test_transformers_own_llama_computes_the_same_here(
    small: list[str], exactly: Callable[[Any], None], tmp_path: Path
) -> None:
    """In several files, with a rope_theta and sizes of its own."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=257, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
            rms_norm_eps=1e-6, rope_theta=50000.0, initializer_range=0.1,
        )
    ).eval()  # fmt: skip
    theirs.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    with pytest.raises(UserError) as caught:
        check_initial(str(tmp_path), compose([*small, "model.num_query_groups=4"]).model)
    sets = str(caught.value).partition("; set ")[2].split()
    assert {one.partition("=")[0] for one in sets} == {
        "model.num_query_groups", "model.norm_epsilon", "model.rotary_base",
    }  # fmt: skip
    trainer = _fresh(small, FP32, *sets)
    load_initial(trainer, str(tmp_path))
    gpt = unwrapped(trainer.chunks[0]).eval()
    exactly(gpt)
    ids = torch.randint(257, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs(ids).logits
        found = gpt(ids, torch.arange(32).expand(2, -1), attention_mask=None)[..., :257]
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())
    leave()


def test_a_run_begins_with_it_and_goes_on_without_it(
    trained: Any, small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fp4pretrain.train import main as running
    from fp4pretrain.train.main import train

    _, run = trained("model.num_query_groups=2")
    export_hf(stored_run(run), tmp_path / "hf")
    leave()
    seen = []
    fit = running.fit
    monkeypatch.setattr(
        running, "fit", lambda trainer, hooks: (seen.append(_weights(trainer)), fit(trainer, hooks))
    )
    overrides = ["model.num_query_groups=2", "logging=quiet", f"run_dir={tmp_path}/next"]
    overrides += [f"init={tmp_path}/hf", "data.valid_tokens=256", "optim.decay=1"]
    train(compose([*small, "precision=bf16", *overrides, "train.steps=1"]))
    expected = stored_run(run)
    from fp4pretrain.convert.weights import CheckpointWeights

    weights = CheckpointWeights(expected.checkpoint, masters=False)
    norm = weights.whole("decoder.final_layernorm.weight")
    assert torch.equal(seen[0]["decoder.final_layernorm.weight"], norm)
    (tmp_path / "hf").rename(tmp_path / "gone")
    train(
        compose(
            [*small, "precision=bf16", *overrides, "train.steps=2", "resume=auto",
             "resume_with=[train.steps]"]
        )
    )  # fmt: skip
    assert len(seen) == 2


def _broken(folder: Path, how: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    file = folder / "model.safetensors"
    if how == "no config":
        (folder / "config.json").unlink()
    elif how == "pickle":
        file.rename(folder / "pytorch_model.bin")
    elif how == "damaged":
        file.write_bytes(file.read_bytes()[: 1 << 10])
    else:
        change = {
            "kind": {"model_type": "mistral"},
            "rope": {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
            "quantized": {"quantization_config": {"quant_method": "gptq"}},
            "sizes": {"num_hidden_layers": 9, "attention_bias": True, "rope_parameters": None,
                      "rope_theta": 5e5},
        }[how]  # fmt: skip
        (folder / "config.json").write_text(json.dumps(config | change))


@pytest.mark.parametrize(
    ("how", "pattern"),
    [
        ("no config", r"init: .* has no config.json of a model"),
        ("pickle", r"init: .* has no safetensors, and nothing else is read"),
        ("damaged", r"init: .* is damaged"),
        ("kind", r"init: .* is a mistral and this model section describes a llama"),
        ("rope", r"init: .* is of rope_type llama3"),
        ("quantized", r"init: .* is quantized"),
        ("sizes", r"init: .*; set model.num_layers=9 model.rotary_base=500000 model.bias=true$"),
    ],
)
def test_a_folder_that_is_no_start_is_one_line(
    plain: Path,
    small: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    how: str,
    pattern: str,
) -> None:
    export_hf(stored_run(plain), tmp_path / "hf", Export(dtype="fp32"))
    _broken(tmp_path / "hf", how)
    with pytest.raises(SystemExit) as caught:
        main(["train", *small, f"init={tmp_path}/hf", f"run_dir={tmp_path}/new", "logging=quiet"])
    told = capsys.readouterr().err
    assert (caught.value.code, told.count("\n")) == (2, 1)
    assert re.match(f"fp4pretrain: {pattern}", told), told
    assert not (tmp_path / "new").exists()
