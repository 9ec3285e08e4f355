"""What is exported computes what the run's model computes: equal logits in transformers for every
preset, and of a quantized folder the very values that the recipe multiplies."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from fp4pretrain import data
from fp4pretrain.cli import main
from fp4pretrain.config import ModelConfig, compose
from fp4pretrain.convert import Export, export_hf
from fp4pretrain.model.families import family_of
from fp4pretrain.numerics import emulate
from fp4pretrain.precision import Progress
from fp4pretrain.presets import groups
from fp4pretrain.train import checkpoint
from fp4pretrain.train.run_dir import CHECKPOINTS
from fp4pretrain.train.stored import stored_run
from fp4pretrain.train.trainer import Trainer, unwrapped

FP32 = "optim.params_dtype=fp32"
ARCHITECTURES = {
    "gpt_1_2b": "ArceeForCausalLM",
    "gpt_8b": "ArceeForCausalLM",
    "gpt_345m": "GPT2LMHeadModel",
    "gpt_1_3b": "GPT2LMHeadModel",
    "gpt_6_7b": "GPT2LMHeadModel",
}
# Shrunk to one size, every preset is one of these.
KINDS = [
    ["model=tiny"],
    ["model=gpt_30m"],
    ["model=gpt_345m"],
    ["model=gpt_1_2b", "model.num_query_groups=2"],
    ["model=llama3_8b", "model.num_query_groups=2"],
]
# Beside the presets: what their keys allow.
OTHERS = [
    ["model.tie_embeddings=true", "model.kv_channels=24", "model.bias=true"],
    ["model.qk_norm=true", "model.kv_channels=32", "model.rotary_base=500000"],
    ["model.activation=gelu", "model.bias=true"],
    ["model=gpt_345m", "model.bias=false", "model.tie_embeddings=false"],
    ["model=gpt_345m", "model.activation=squared_relu"],
]


Make = Callable[..., tuple[Trainer, Path]]


def _logits(trainer: Trainer, ids: torch.Tensor, exactly: Callable[[Any], None]) -> torch.Tensor:
    """Ours [b, s, vocabulary], computed in FP32."""
    gpt = unwrapped(trainer.chunks[0]).eval()
    exactly(gpt)
    positions = torch.arange(ids.shape[1]).expand(ids.shape[0], -1)
    with torch.no_grad():
        return gpt(ids, positions, attention_mask=None).float()


@pytest.fixture(scope="module")
def kinds(small: list[str]) -> list[ModelConfig]:
    return [compose([*small, *kind]).model for kind in KINDS]


@pytest.mark.parametrize("name", groups()["model"])
def test_every_preset_is_an_architecture_and_one_of_the_kinds(
    name: str, small: list[str], kinds: list[ModelConfig]
) -> None:
    model = compose([f"model={name}"]).model
    family = family_of(model)
    assert family.architecture == ARCHITECTURES.get(name, "LlamaForCausalLM")
    assert family.config["vocab_size"] == model.vocab_size
    shape = [one.split("=")[0] for one in small if one.startswith("model.")]
    shared = (model.num_query_groups or model.num_attention_heads) != model.num_attention_heads
    shrunk = replace(
        model,
        **{
            key.removeprefix("model."): getattr(kinds[0], key.removeprefix("model."))
            for key in shape
        },
        num_query_groups=2 if shared else None,
    )
    assert shrunk in kinds


@pytest.mark.parametrize("model", [*KINDS, *OTHERS], ids=",".join)
def test_transformers_computes_the_same_logits(
    trained: Make, exactly: Callable[[Any], None], tmp_path: Path, model: list[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    trainer, run = trained(*model, FP32)
    export_hf(stored_run(run), tmp_path / "hf")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "hf", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(loaded).__name__ == family_of(trainer.config.model).architecture
    ids = torch.randint(257, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = loaded.eval()(ids).logits
    ours = _logits(trainer, ids, exactly)[..., : trainer.config.model.vocab_size]
    assert theirs.shape == ours.shape
    assert float(ours.std()) > 0.1
    assert float((theirs - ours).abs().max()) < 1e-5 * float(ours.abs().max())


def test_the_exported_tokenizer_gives_the_same_ids(run: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    export_hf(stored_run(run), tmp_path / "hf")
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    text = "héllo  wörld\n\t\x00 日本 a\u00ad"
    ids = data.load_tokenizer("byte").encode(text).tolist()
    assert loaded(text)["input_ids"] == ids
    assert loaded.decode(ids) == text
    assert (loaded.eos_token, loaded.eos_token_id) == ("<|endoftext|>", 256)


def _stored(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_weights_are_what_the_gemms_read_or_the_masters(trained: Make, tmp_path: Path) -> None:
    trainer, run = trained()
    for part in getattr(trainer.optimizer, "chained_optimizers", [trainer.optimizer]):
        for group in part.fp32_from_float16_groups:
            for master in group:
                master.data.mul_(1 + 2**-12)  # what BF16 cannot say
    checkpoint.save(trainer, run / CHECKPOINTS, keep_last=1)
    export_hf(stored_run(run), tmp_path / "bf16")
    export_hf(stored_run(run), tmp_path / "fp32", Export(dtype="fp32"))
    narrow, wide = _stored(tmp_path / "bf16"), _stored(tmp_path / "fp32")
    assert {t.dtype for t in narrow.values()} == {torch.bfloat16}
    assert {t.dtype for t in wide.values()} == {torch.float32}
    for name, tensor in narrow.items():
        assert torch.equal(tensor.float() * (1 + 2**-12), wide[name])


# Blocks at the ends stay BF16 or not, tiles or rows, both formats.
RECIPES = [
    ["precision=nvfp4", "precision.keep.first_blocks=1", "precision.keep.last_blocks=0"],
    ["precision=nvfp4", "precision.keep.first_blocks=0", "precision.keep.last_blocks=0"],
    ["precision=nvfp4", "precision.fprop.w.block=1d", "precision.fprop.w.scale=cap256",
     "precision.keep.first_blocks=0", "precision.keep.last_blocks=0"],
    ["precision=mxfp4_h16", "precision.fprop.rotation.kind=none"],
]  # fmt: skip
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def _unpacked(stored: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """A linear's weight by compressed-tensors' description of its layout, written without our code."""
    packed = stored[f"{name}.weight_packed"]
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).int()
    values = E2M1[codes & 7] * torch.where(codes >= 8, -1.0, 1.0)
    scale = stored[f"{name}.weight_scale"]
    if scale.dtype == torch.uint8:
        factors = torch.exp2(scale.float() - 127)
    else:
        factors = scale.float() / stored[f"{name}.weight_global_scale"]
    return values * factors.repeat_interleave(values.shape[1] // scale.shape[1], dim=1)


@pytest.mark.parametrize("recipe", RECIPES, ids=",".join)
def test_a_quantized_folder_holds_the_values_that_the_recipe_multiplies(
    trained: Make, tmp_path: Path, recipe: list[str]
) -> None:
    trainer, run = trained("model.num_query_groups=2", *recipe)
    export_hf(stored_run(run), tmp_path / "plain")
    export_hf(stored_run(run), tmp_path / "fp4", Export(quantize=True))
    plain, stored = _stored(tmp_path / "plain"), _stored(tmp_path / "fp4")
    config = json.loads((tmp_path / "fp4" / "config.json").read_text())["quantization_config"]
    whole = {f"{layer}.{name}": linear for layer, name, linear in trainer.binding.linears}
    plan = trainer.binding.plan
    ignored = {"lm_head"}
    for linear in family_of(trainer.config.model).linears:
        for layer in range(2):
            spec = plan.at(layer, linear.ours, Progress()).fprop.w
            values, alpha = emulate(whole[f"{layer}.{linear.ours}"].weight.detach(), spec)
            expected = values * (1 if alpha is None else alpha)
            for theirs, rows in zip(linear.theirs, linear.rows, strict=True):
                name = f"model.layers.{layer}.{theirs}"
                if not spec.quantized:
                    ignored.add(name)
                    assert torch.equal(stored[f"{name}.weight"], plain[f"{name}.weight"])
                    continue
                found = _unpacked(stored, name)
                torch.testing.assert_close(
                    found, expected if rows is None else expected[rows], rtol=1e-6, atol=0
                )
                assert f"{name}.weight" not in stored
    assert set(config["ignore"]) == ignored
    assert ignored != {"lm_head"} or "first_blocks=1" not in recipe[1]


def test_compressed_tensors_reads_the_quantized_folder(trained: Make, tmp_path: Path) -> None:
    """transformers unpacks it by that package's own code: its logits are those of the unpacked weights."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    _, run = trained("model.num_query_groups=2", *RECIPES[0])
    export_hf(stored_run(run), tmp_path / "fp4", Export(quantize=True))
    export_hf(stored_run(run), tmp_path / "plain")
    stored = _stored(tmp_path / "fp4")
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(tmp_path / "fp4", dtype=torch.bfloat16).eval()
    ours = load(tmp_path / "plain", dtype=torch.float32).eval()
    weights = ours.state_dict()
    for name in weights:
        end = name.removesuffix(".weight")
        if f"{end}.weight_packed" in stored:
            weights[name] = _unpacked(stored, end).bfloat16().float()
    ours.load_state_dict(weights)
    ids = torch.randint(257, (2, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = theirs(ids).logits.float(), ours(ids).logits
    # the weights are equal; activations are BF16 there: 2^-8 a rounding, over two blocks
    assert float((found - expected).norm() / expected.norm()) < 0.03


REFUSED = [
    ([], ["model.attention_softcap=50"], r"model.attention_softcap: no Hugging Face architecture"),
    ([], ["model.normalization=layernorm"], r"model.normalization: no Hugging Face .* layernorm"),
    ([], ["model.position=learned"], r"model.normalization: no Hugging Face"),
    ([], ["model=gpt_345m", "model.qk_norm=true"], r"model.qk_norm: no Hugging Face"),
    (["--quantize"], [], r"--quantize: the recipe's forward pass has no linear"),
    (["--quantize"], ["precision=mxfp4_h16"], r"--quantize: precision.fprop.rotation: "),
    (["--quantize"], ["precision=mxfp4_full_grid"], r"--quantize: .*scale: full_grid_adaptive has a factor"),
    (["--quantize"], ["precision=hot_channels"], r"--quantize: .*split: channels is a second term"),
    (["--quantize"], ["precision=nvfp4_qk_mxfp8"], r"--quantize: rules give q, k and v of block 0 different"),
    (["--quantize"], ["precision=nvfp4_fixed"], r"--quantize: .*amax: fixed is a number of the run"),
    (["--quantize"], ["model=gpt_345m", "precision=nvfp4"], r"--quantize: GPT2LMHeadModel stores no"),
    (["--quantize"], ["precision=nvfp4", "model.ffn_hidden_size=72"], r"--quantize: mlp.linear_fc2 has"),
    (["--tokenizer", "{bpe}"], [], r"--tokenizer: .* has 300 ids and the model model.vocab_size=257"),
    (["--tokenizer", "nowhere.json"], [], r"data.tokenizer: nowhere.json does not exist"),
    (["--dtype", "fp8"], [], r"argument --dtype: invalid choice"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "overrides", "pattern"), REFUSED)
def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(
    trained: Make,
    plain: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    overrides: list[str],
    pattern: str,
) -> None:
    folder = trained(*overrides)[1] if overrides else plain
    bpe = tmp_path / "bpe.json"
    if "{bpe}" in options:
        (tmp_path / "text.txt").write_text(" ".join(f"word{i} other{i % 7}" for i in range(900)))
        data.train_bpe([str(tmp_path / "text.txt")], 300, str(bpe))
    before = sorted(tmp_path.iterdir())
    options = [text.format(bpe=bpe) for text in options]
    with pytest.raises(SystemExit) as caught:
        main(["export", str(folder), "--to", "hf", "--out", str(tmp_path / "hf"), *options])
    told = capsys.readouterr().err
    assert (caught.value.code, told.count("\n")) == (2, 1)
    assert re.match(f"fp4pretrain: {pattern}", told), told
    assert sorted(tmp_path.iterdir()) == before


def test_folders_that_are_no_run_or_are_there_already_are_one_line(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for given, out, pattern in (
        (tmp_path / "empty", "hf", r".* is no run; give a folder that fp4pretrain train made"),
        (tmp_path / "nowhere", "hf", r".* is no run"),
        (run, "empty", r"--out: .* exists already; remove it"),
        (run, "run/config.yaml/hf", r"--out: cannot write in"),
    ):
        with pytest.raises(SystemExit):
            main(["export", str(given), "--out", str(tmp_path / out)])
        told = capsys.readouterr().err
        assert re.match(f"fp4pretrain: {pattern}", told) and told.count("\n") == 1, told
    shard = next((run / CHECKPOINTS).glob("step_*/rank_*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    with pytest.raises(SystemExit):
        main(["export", str(run), "--out", str(tmp_path / "hf")])
    assert re.match(r"fp4pretrain: .* is damaged \(rank_", capsys.readouterr().err)
    assert not list(tmp_path.glob("*hf*"))


NVFP4 = [*RECIPES[0], "model.num_query_groups=2"]


def _by_modelopt(stored: dict[str, torch.Tensor], name: str) -> torch.Tensor:
    """A linear's weight by the description of ModelOpt's layout, written without our code."""
    packed = stored[f"{name}.weight"]
    codes = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1).int()
    values = E2M1[codes & 7] * torch.where(codes >= 8, -1.0, 1.0)
    scale = stored[f"{name}.weight_scale"].float() * stored[f"{name}.weight_scale_2"]
    return values * scale.repeat_interleave(16, dim=1)


@pytest.mark.parametrize("calibrated", [False, True])
def test_modelopts_layout_holds_the_same_values(
    trained: Make, tmp_path: Path, calibrated: bool
) -> None:
    """As in compressed-tensors; and scales of activations that no input of the text goes beyond."""
    _, run = trained(*NVFP4)
    (tmp_path / "text.txt").write_text("def main(argv):\n    return argv\n" * 9)
    calibrate = ["--calibrate", str(tmp_path / "text.txt")] if calibrated else []
    export = ["export", str(run), "--quantize", "--out"]
    main([*export, str(tmp_path / "ct")])
    main([*export, str(tmp_path / "mo"), "--layout", "modelopt", *calibrate])
    theirs, stored = _stored(tmp_path / "ct"), _stored(tmp_path / "mo")
    quantized = [n.removesuffix(".weight_packed") for n in theirs if n.endswith("_packed")]
    assert len(quantized) == 7  # of one block: q, k, v, o, gate, up, down
    for name in quantized:
        torch.testing.assert_close(
            _by_modelopt(stored, name), _unpacked(theirs, name), rtol=1e-6, atol=0
        )
        assert stored[f"{name}.weight"].dtype == torch.uint8
        assert stored[f"{name}.weight_scale"].dtype == torch.float8_e4m3fn
        scale = stored.get(f"{name}.input_scale")
        assert (scale is not None) == calibrated
        assert scale is None or (scale.shape == () and 0.01 < float(scale) * 2688 < 1000)
    plain = {n for n in theirs if not n.removesuffix("_packed").startswith(tuple(quantized))}
    assert all(torch.equal(theirs[name], stored[name]) for name in plain)
    algorithm = "NVFP4" if calibrated else "W4A16_NVFP4"
    told = json.loads((tmp_path / "mo" / "hf_quant_config.json").read_text())["quantization"]
    config = json.loads((tmp_path / "mo" / "config.json").read_text())["quantization_config"]
    ignored = json.loads((tmp_path / "ct" / "config.json").read_text())["quantization_config"][
        "ignore"
    ]
    assert told == {
        "quant_algo": algorithm, "kv_cache_quant_algo": None, "group_size": 16, "exclude_modules": ignored,
    }  # fmt: skip
    assert config == {
        "quant_method": "modelopt", "quant_algo": algorithm, "group_size": 16, "ignore": ignored,
    }  # fmt: skip


def test_calibration_sees_the_largest_input_of_each_linear(trained: Make) -> None:
    from fp4pretrain.infer import largest_inputs, load_model

    _, run = trained(FP32)
    model = load_model(stored_run(run), device="cpu")
    short, long = (largest_inputs(model, ["ab" * n]) for n in (3, 60))
    assert set(short) == {(layer, one.ours) for layer in range(2) for one in family_of(
        model.run.config.model).linears}  # fmt: skip
    assert all(0 < short[place] <= long[place] for place in short)
    # what leaves the first norm is what enters the first linear
    ids = torch.tensor([[256, *b"ab" * 3]])[:, :-1]
    with torch.no_grad():
        embedded = model.gpt.embedding(ids, torch.arange(6)[None])
        entering = model.gpt.decoder.layers[0].input_layernorm(embedded)
    assert short[0, "self_attention.linear_qkv"] == pytest.approx(float(entering.abs().max()))


@pytest.mark.parametrize(
    ("options", "recipe", "pattern"),
    [
        (["--layout", "modelopt"], [], r"--layout: it is about linears in FP4; add --quantize"),
        (["--calibrate", "x"], [], r"--calibrate: it is about linears in FP4; add --quantize"),
        (["--quantize", "--calibrate", "x"], [], r"--calibrate: compressed-tensors has activations"),
        (["--quantize", "--layout", "modelopt"], RECIPES[3], r"--layout: modelopt has no place for mxfp4"),
        (["--quantize", "--layout", "modelopt", "--calibrate", "{text}"],
         [*RECIPES[1], "precision.fprop.x.format=bf16", "precision.fprop.x.block=default"],
         r"--calibrate: the recipe has activations in bf16"),
        (["--quantize", "--layout", "modelopt", "--calibrate", "{empty}"], RECIPES[1],
         r"inputs: no text in "),
    ],
)  # fmt: skip
def test_what_a_layout_has_no_place_for_is_one_line(
    trained: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    recipe: list[str],
    pattern: str,
) -> None:
    _, run = trained(*recipe)
    for name, text in (("text", "def main():\n"), ("empty", "")):
        (tmp_path / f"{name}.txt").write_text(text)
        options = [one.replace(f"{{{name}}}", str(tmp_path / f"{name}.txt")) for one in options]
    with pytest.raises(SystemExit):
        main(["export", str(run), "--out", str(tmp_path / "hf"), *options])
    told = capsys.readouterr().err
    assert re.match(f"fp4pretrain: {pattern}", told) and told.count("\n") == 1, told
    assert not list(tmp_path.glob("*hf*"))
