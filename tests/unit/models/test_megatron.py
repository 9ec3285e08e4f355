"""A checkpoint of megatron-core, out and in: its own modules compute our logits and ours compute theirs."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron_model import load_plain
from megatron_model import plain as plain_model

from fp4pretrain.cli import main
from fp4pretrain.config import compose
from fp4pretrain.convert import Export, export_megatron
from fp4pretrain.errors import UserError
from fp4pretrain.model.layout import check_layout
from fp4pretrain.model.megatron_names import arguments, section_of
from fp4pretrain.parallel.groups import join, leave, pick_device
from fp4pretrain.train.initial import check_initial, load_initial
from fp4pretrain.train.stored import stored_run
from fp4pretrain.train.trainer import Trainer, build_trainer, unwrapped

FP32 = "optim.params_dtype=fp32"
MODELS = [
    ["model=tiny"],
    [
        "model.num_query_groups=2",
        "model.qk_norm=true",
        "model.vocab_size=300",
        "model.kv_channels=24",
    ],
    ["model=gpt_1_2b", "model.num_query_groups=2", "model.bias=true", "model.rotary_base=50000"],
    ["model=gpt_345m"],
    [
        "model.normalization=layernorm",
        "model.tie_embeddings=true",
    ],  # no architecture of Hugging Face
]


def _fresh(small: list[str], *overrides: str) -> Trainer:
    config = compose([*small, "precision=bf16", *overrides])
    world = join(device=pick_device("cpu"), seed=config.seed)
    return build_trainer(config, world, check_layout(config, 1))


def _logits(gpt: Any) -> torch.Tensor:
    ids = torch.randint(257, (2, 32), generator=torch.Generator().manual_seed(1))
    hidden = torch.ones(32, 32, dtype=torch.bool).triu(1)[None, None]
    with torch.no_grad():
        return gpt(ids, torch.arange(32).expand(2, -1), attention_mask=hidden).float()


def _ours(trainer: Trainer, exactly: Callable[[Any], None]) -> torch.Tensor:
    gpt = unwrapped(trainer.chunks[0]).eval()
    exactly(gpt)
    ids = torch.randint(257, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return gpt(ids, torch.arange(32).expand(2, -1), attention_mask=None).float()


def _close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert float(expected.std()) > 0.1
    assert float((found - expected).abs().max()) < 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("model", MODELS, ids=",".join)
def test_megatron_cores_own_model_computes_the_same_logits(
    trained: Any, exactly: Callable[[Any], None], tmp_path: Path, model: list[str]
) -> None:
    """Out: everything that its local layer spec asks for is there."""
    trainer, run = trained(*model, FP32)
    export_megatron(stored_run(run), tmp_path / "mc")
    folder = str(tmp_path / "mc" / "release")
    plain, _ = load_plain(folder)
    _close(_logits(plain), _ours(trainer, exactly))


def _saved(
    folder: Path, a: Namespace, *, metadata: dict[str, Any] | None = None, common: Any = None
) -> GPTModel:
    """A checkpoint of megatron-core's own model, written by its own writer; every weight drawn anew."""
    plain = plain_model(a)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.empty(parameter.shape).normal_(0, 0.1, generator=generator))
    folder.mkdir(parents=True)
    state = {"model": plain.sharded_state_dict(metadata=metadata), **(common or {})}
    dist_checkpointing.save(state, str(folder))
    return plain


def _arguments(small: list[str], *model: str) -> Namespace:
    section = compose([*small, *model]).model
    return Namespace(**arguments(section, padded_vocab=384), tensor_model_parallel_size=1)


@pytest.mark.parametrize("separate", [False, True], ids=["one tensor", "each block"])
@pytest.mark.parametrize("model", MODELS, ids=",".join)
def test_its_own_checkpoint_is_a_start(
    small: list[str],
    exactly: Callable[[Any], None],
    tmp_path: Path,
    model: list[str],
    separate: bool,
) -> None:
    """In: blocks stacked or apart, SwiGLU's projections in one or two, padded further than here."""
    trainer = _fresh(small, *model, FP32)
    metadata = {"singleton_local_shards": separate, "dp_cp_group": None}
    a = _arguments(small, *model)
    plain = _saved(tmp_path / "mc", a, metadata=metadata, common={"args": a, "iteration": 3})
    check_initial(str(tmp_path / "mc"), trainer.config.model)
    load_initial(trainer, str(tmp_path / "mc"))
    vocabulary = trainer.config.model.vocab_size
    found, expected = _ours(trainer, exactly), _logits(plain)
    _close(found[..., :vocabulary], expected[..., :vocabulary])


def test_there_and_back_is_bit_for_bit(trained: Any, small: list[str], tmp_path: Path) -> None:
    """BF16 weights, the rows that pad the vocabulary too, and masters from the export of masters."""
    first, run = trained("model.num_query_groups=2")
    expected = {n: p.detach().clone() for n, p in unwrapped(first.chunks[0]).named_parameters()}
    for dtype in ("bf16", "fp32"):
        export_megatron(stored_run(run), tmp_path / dtype, Export(dtype=dtype))
        leave()
        trainer = _fresh(small, "model.num_query_groups=2")
        load_initial(trainer, str(tmp_path / dtype))
        found = dict(unwrapped(trainer.chunks[0]).named_parameters())
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("model", [*MODELS, ["model=llama3_8b"], ["model=gpt_8b"]], ids=",".join)
def test_its_arguments_say_the_model_section(model: list[str]) -> None:
    section = compose(model).model
    told = section_of(arguments(section, padded_vocab=384))
    resolved = vars(section) | {
        "num_query_groups": section.num_query_groups or section.num_attention_heads,
        "kv_channels": section.kv_channels or section.hidden_size // section.num_attention_heads,
    }
    assert told == {key: resolved[key] for key in told}
    assert {"num_layers", "activation", "normalization", "position", "bias", "qk_norm"} <= set(told)


class Run:
    """What a pickle would run."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


def _broken(folder: Path, how: str) -> None:
    checkpoint = folder / "release"
    if how == "unfinished":
        (checkpoint / "metadata.json").unlink()
    elif how == "no checkpoint":
        shutil.rmtree(checkpoint)
    elif how == "format":
        (checkpoint / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    elif how == "truncated":
        data = checkpoint / "__0_0.distcp"
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    elif how == "places":
        (checkpoint / ".metadata").write_bytes(b"\x80\x04nothing")
    elif how == "program":
        (checkpoint / ".metadata").write_bytes(pickle.dumps(Run()))
    else:
        common = torch.load(checkpoint / "common.pt", weights_only=False)
        changes = {
            "experts": {"num_experts": 8},
            "tanh": {"swiglu": False, "add_bias_linear": True, "bias_gelu_fusion": True},
            "sizes": {"num_layers": 9, "rotary_base": 500000, "add_bias_linear": True},
            "words": {"padded_vocab_size": 257, "make_vocab_size_divisible_by": 4},
        }
        if how == "arguments that run":
            common["args"].tokenizer = Run()
        else:
            vars(common["args"]).update(changes[how])
        torch.save(common, checkpoint / "common.pt")


REFUSED = [
    ("unfinished", r"init: .*release has no metadata.json, .* the save did not end"),
    (
        "no checkpoint",
        r"init: .*latest_checkpointed_iteration.txt names release, which is not there",
    ),
    ("format", r"init: .* is of the format zarr, and torch_dist alone is read"),
    ("truncated", r"init: .* is damaged \(__0_0.distcp: "),
    ("places", r"init: .*\.metadata is damaged"),
    ("program", r"init: .*\.metadata is damaged"),
    ("arguments that run", r"init: .*release holds objects .*, and no program of a file is run"),
    ("experts", r"init: the checkpoint's model was built with num_experts=8"),
    ("tanh", r"init: .*bias_gelu_fusion=True, a GELU by tanh"),
    ("sizes", r"init: .*; set model.num_layers=9 model.bias=true model.rotary_base=500000$"),
    ("words", r"init: .*; set model.vocab_size=384$"),
]


@pytest.mark.parametrize(("how", "pattern"), REFUSED)
def test_a_checkpoint_that_is_no_start_is_one_line(
    plain: Path,
    small: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    how: str,
    pattern: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    export_megatron(stored_run(plain), tmp_path / "mc")
    _broken(tmp_path / "mc", how)
    with pytest.raises(SystemExit) as caught:
        main(["train", *small, f"init={tmp_path}/mc", f"run_dir={tmp_path}/new", "logging=quiet"])
    told = capsys.readouterr().err
    assert (caught.value.code, told.count("\n")) == (2, 1)
    assert re.match(f"fp4pretrain: {pattern}", told), told
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "new").exists()


def test_a_model_that_shapes_alone_tell_apart_is_refused(small: list[str], tmp_path: Path) -> None:
    """Without arguments, of a program of its own: biases and norms that one of the two lacks."""
    join(device=pick_device("cpu"), seed=1)
    _saved(tmp_path / "mc", _arguments(small, "model.bias=true"))
    section = compose(small).model
    with pytest.raises(UserError, match=r"also holds decoder.layers.*bias, so it is another model"):
        check_initial(str(tmp_path / "mc"), section)
    section.bias = section.qk_norm = True
    with pytest.raises(UserError, match=r"lacks decoder.layers.self_attention.k_layernorm.weight"):
        check_initial(str(tmp_path / "mc"), section)


@pytest.mark.parametrize(
    ("options", "overrides", "pattern"),
    [
        (["--quantize"], [], r"--quantize: a megatron-core checkpoint holds no such thing"),
        (["--tokenizer", "byte"], [], r"--tokenizer: a megatron-core checkpoint holds no such thing"),
        ([], ["model.attention_softcap=50"], r"model.attention_softcap: megatron-core has no 50"),
    ],
)  # fmt: skip
def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(
    trained: Any,
    plain: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    overrides: list[str],
    pattern: str,
) -> None:
    folder = trained(*overrides)[1] if overrides else plain
    with pytest.raises(SystemExit):
        main(["export", str(folder), "--to", "megatron", "--out", str(tmp_path / "mc"), *options])
    told = capsys.readouterr().err
    assert re.match(f"fp4pretrain: {pattern}", told) and told.count("\n") == 1, told
    assert not list(tmp_path.glob("*mc*"))
