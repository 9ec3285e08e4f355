"""The audit: what each linear computes, in JSON; and that a run which did otherwise is an error."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fp4pretrain.audit import audit, done, lines
from fp4pretrain.cli import main
from fp4pretrain.config import compose, plan_of
from fp4pretrain.train.main import train

CPU = torch.device("cpu")
SMALL = (
    "model.num_layers=2 model.hidden_size=64 model.num_attention_heads=2 model.ffn_hidden_size=96 "
    "model.seq_length=32 model.vocab_size=257 train.micro_batch=2 train.global_batch=4 train.steps=2 "
    "train.eval_interval=0 data.valid_tokens=128 data.mock=true logging=quiet "
    "logging.wandb.mode=disabled checkpoint.at_end=false optim.warmup=0 optim.decay=0"
).split()
KEEP = ["precision.keep.first_blocks=0", "precision.keep.last_blocks=1"]


def test_every_operand_is_said_and_the_shares_are_those_worked_out_by_hand() -> None:
    found = audit(compose([*SMALL, "precision=nvfp4", *KEEP]), CPU)
    names = [one["name"] for one in found["linears"]]
    assert names[0] == "layers.0.self_attention.linear_qkv"
    assert names[-1] == "output_layer" and len(names) == 2 * 4 + 1
    first, last = found["linears"][0]["gemms"], found["linears"][-2]["gemms"]
    assert first["wgrad"]["x"]["format"] == "nvfp4"
    assert first["wgrad"]["rotation"]["kind"] == "random_hadamard"
    assert (first["dgrad"]["dy"]["rounding"], first["dgrad"]["w"]["block"]) == ("stochastic", "2d")
    assert (
        first["fprop"]["backend"] in ("cpp", "reference")
        and "matmul" in first["fprop"]["instruction"]
    )
    assert {last[g][o]["format"] for g, o in (("fprop", "x"), ("wgrad", "dy"))} == {"bf16"}
    # multiply-adds a token and GEMM, of one block: qkv 3 h h, proj h h, SwiGLU 2 h f and f h
    h, f, s, v = 64, 96, 32, 257
    block, head = 4 * h * h + 3 * h * f, v * h
    attention = 12 * 2 * h * s
    total = 6 * (2 * block + head) + attention
    assert found["flops"] == pytest.approx(
        {"fp4": 6 * block / total, "fp8": 0.0, "bf16": 1 - 6 * block / total}
    )
    (rule,) = found["rules"]
    assert rule["key"] == "precision.keep.last_blocks" and len(rule["linears"]) == 4
    assert found["never_quantized"] == rule["linears"]
    text = "\n".join(lines(found))
    assert "4 linears: layers.0.self_attention.linear_qkv" in text and "FLOPs: FP4 " in text


def test_switches_to_come_are_said_with_the_shares_after_them() -> None:
    found = audit(
        compose([*SMALL, "precision=mxfp8", "precision.tail.at=0.5", "precision.name=x"]), CPU
    )
    (switch,) = found["switches"]
    assert switch["rule"] == "precision.tail" and switch["start"] == "0.5 of the run"
    assert not switch["holds_at_start"]
    # fprop in BF16 leaves two GEMMs of three
    assert switch["flops"]["fp8"] == pytest.approx(found["flops"]["fp8"] * 2 / 3)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("precision.keep.modules=[layers.9.*]", "precision.keep.modules"),
        ("precision.keep.last_blocks=2", "precision.keep"),
        ("precision.backend=native", "precision.backend"),
    ],
)
def test_what_a_run_would_refuse_the_audit_refuses(
    override: str, key: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["audit", *SMALL, "precision=nvfp4", override, "--json"])
    assert stopped.value.code == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith(f"fp4pretrain: {key}")
    assert said.err.count("\n") == 1


def test_the_command_prints_json_alone(capsys: pytest.CaptureFixture[str]) -> None:
    main(["audit", *SMALL, "precision=quartet2", "--json"])
    found = json.loads(capsys.readouterr().out)
    gemm = found["linears"][0]["gemms"]["dgrad"]
    assert (gemm["w"]["source"], gemm["w"]["rounding"]) == ("forward", "eden")


def test_a_run_counts_what_it_did_and_one_that_did_otherwise_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of two microbatches; then the same with a binding whose linears got another recipe."""
    from fp4pretrain.errors import UserError
    from fp4pretrain.model.build import PlanBinding

    run = [*SMALL, "precision=nvfp4", *KEEP, "precision.tail.at=0.5"]
    train(compose([*run, f"run_dir={tmp_path}/right"]))
    told = json.loads((tmp_path / "right" / "audit.json").read_text())["done"]
    # block 0: four linears; fprop is NVFP4 in the first step alone, dgrad and wgrad in both
    assert told["steps"] == 2
    assert told["products"]["nvfp4 x nvfp4"] == 4 * 2 * (1 + 2 + 2)
    # nine linears of three GEMMs, in two steps of two microbatches
    assert sum(told["products"].values()) == 9 * 3 * 4

    honest = PlanBinding.set_recipes

    def swapped(self: PlanBinding, recipes: list) -> None:
        honest(self, [recipes[-1], *recipes[1:]])  # block 0's QKV as the head: BF16

    monkeypatch.setattr(PlanBinding, "set_recipes", swapped)
    with pytest.raises(
        UserError, match="layers.0.self_attention.linear_qkv fprop x: the plan says"
    ):
        train(compose([*run, f"run_dir={tmp_path}/wrong"]))


def test_parts_of_the_projections_are_linears_of_the_audit_and_are_counted(tmp_path: Path) -> None:
    run = [*SMALL, "precision=nvfp4_qk_mxfp8", *KEEP, "model.num_query_groups=1"]
    found = audit(compose(run), CPU)
    parts = [one for one in found["linears"] if one["layer"] == 0][:2]
    assert [one["name"].rpartition("_")[2] for one in parts] == ["qkv.qk", "qkv.v"]
    assert [one["gemms"]["dgrad"]["w"]["format"] for one in parts] == ["mxfp8", "nvfp4"]
    # h 64: q has 64 rows, k and v 32 each, in both blocks; the last one keeps the rest in BF16
    h, f, s, v = 64, 96, 32, 257
    total = 6 * (2 * ((h + 2 * 32) * h + h * h + 3 * h * f) + v * h) + 12 * 2 * h * s
    assert found["flops"] == pytest.approx(
        {
            "fp4": 6 * (32 * h + h * h + 3 * h * f) / total,
            "fp8": 6 * 2 * (h + 32) * h / total,
            "bf16": (6 * (32 * h + h * h + 3 * h * f + v * h) + 12 * 2 * h * s) / total,
        }
    )
    train(compose([*run, f"run_dir={tmp_path}/run"]))  # what was cast otherwise would be refused
    told = json.loads((tmp_path / "run" / "audit.json").read_text())["done"]
    # two blocks' qk; block 0's v, proj, fc1 and fc2; each three GEMMs, two steps, two microbatches
    assert told["products"]["mxfp8 x mxfp8"] == 2 * 3 * 4
    assert told["products"]["nvfp4 x nvfp4"] == 4 * 3 * 4


def test_nothing_cast_is_otherwise_too() -> None:
    recipe = plan_of(compose(["precision=fp8"])).recipe
    linear = SimpleNamespace(bound=SimpleNamespace(layer=0, linear=0))
    place = (0, "self_attention.linear_qkv")
    binding = SimpleNamespace(
        linears=[(*place, linear)],
        followed={place: {recipe}},
        sites=SimpleNamespace(cast={}, multiplied={}),
    )
    casts, products, wrong = done(binding)
    assert casts == products == {} and len(wrong) == 6
    assert all("cast was nothing" in clause for clause in wrong)
