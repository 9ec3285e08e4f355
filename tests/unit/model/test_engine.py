"""``model.implementation=transformer_engine``: which plans it takes, and megatron-core's own layer spec
through a stand-in that has Transformer Engine's names (the package itself needs a GPU: tests/gpu)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from fp4pretrain.cli import main
from fp4pretrain.config import compose, plan_of
from fp4pretrain.errors import UserError
from fp4pretrain.model import engine
from fp4pretrain.model.engine import engine_fields

ENGINE = "model.implementation=transformer_engine"
HYBRID = {"fp8": "hybrid", "fp8_recipe": "tensorwise"}
DELAYED = {
    "fp8": "hybrid", "fp8_recipe": "delayed", "fp8_amax_history_len": 16, "fp8_amax_compute_algo": "max",
}  # fmt: skip
ENDS = {
    "first_last_layers_bf16": True,
    "num_layers_at_start_in_bf16": 1,
    "num_layers_at_end_in_bf16": 2,
}
KEEP = ["precision.keep.first_blocks=1", "precision.keep.last_blocks=2"]
NO_KEEP = ["precision.keep.first_blocks=0", "precision.keep.last_blocks=0"]
PLANS: list[tuple[list[str], dict[str, Any] | str]] = [
    (["precision=bf16"], {}),
    (["precision=fp8"], HYBRID),
    (["precision=fp8", *KEEP], HYBRID | ENDS),
    (["precision=fp8_delayed"], DELAYED),
    (["precision=fp8_delayed", "precision.fprop.x.amax_steps=32"], "has no such recipe"),
    (["precision=fp8_delayed", *KEEP], "blocks are in BF16 beside delayed scaling"),
    (["precision=mxfp8"], {"fp8": "e4m3", "fp8_recipe": "mxfp8"}),
    (["precision=nvfp4", *NO_KEEP], {"fp4": "e2m1", "fp4_recipe": "nvfp4"}),
    (["precision=nvfp4", *KEEP], {"fp4": "e2m1", "fp4_recipe": "nvfp4"} | ENDS),
    (["precision=nvfp4", *NO_KEEP, "precision.tail.at=0.8", "precision.tail.to_bf16=[fprop]"],
     "linears or moments of different recipes"),
    (["precision=nvfp4_no_sr"], "has no such recipe"),
    (["precision=mxfp4_h16"], "has no such recipe"),
    (["precision=nvfp4_qk_mxfp8"], "has no such recipe|different recipes"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "expected"), PLANS)
def test_a_plan_is_its_recipe_or_is_refused(
    overrides: list[str], expected: dict[str, Any] | str
) -> None:
    plan = plan_of(compose(["model=tiny", "model.num_layers=8", *overrides]))
    if isinstance(expected, str):
        with pytest.raises(UserError, match=f"^model.implementation: .*({expected})"):
            engine_fields(plan)
    else:
        assert engine_fields(plan) == expected
        TransformerConfig(num_layers=8, hidden_size=64, num_attention_heads=4, **expected)


def test_without_it_the_run_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "why_no_engine", lambda: "Transformer Engine: pip install it")
    with pytest.raises(SystemExit):
        main(["train", "model=tiny", "data=mock", ENGINE, f"run_dir={tmp_path}/run"])
    told = capsys.readouterr().err
    assert told.startswith("fp4pretrain: model.implementation: no Transformer Engine: pip install")
    assert told.count("\n") == 1 and not (tmp_path / "run").exists()


def test_steps_beside_it_are_refused_before_any_is_timed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "why_no_engine", lambda: "Transformer Engine: pip install it")
    with pytest.raises(SystemExit):
        main(
            ["bench", "step", "--engine", "--out", str(tmp_path / "out"), "model=tiny", "data=mock"]
        )
    told = capsys.readouterr().err
    assert told.startswith("fp4pretrain: model.implementation: no Transformer Engine"), told
    assert not (tmp_path / "out").exists()


def test_its_casts_are_not_audited(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["audit", "model=tiny", "precision=fp8", ENGINE])
    told = capsys.readouterr().err
    assert told.startswith("fp4pretrain: model.implementation: transformer_engine shows no casts")


OTHERWISE = [
    (["precision=bf16", "model.attention_softcap=50"], "model.attention_softcap: its attention has none"),
    (["precision=bf16", "data.document_mask=true"], "data.document_mask: its attention is causal alone"),
    (["precision=bf16", "observe.interval=5"], "observe.interval: it shows no casts"),
    (["precision=fp8"], "train.eval_bf16: its linears cannot be put into BF16"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "pattern"), OTHERWISE)
def test_what_its_modules_do_not_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, overrides: list[str], pattern: str
) -> None:
    monkeypatch.setattr(engine, "why_no_engine", lambda: None)
    config = compose(["model=tiny", ENGINE, *overrides])
    plan = plan_of(config)
    with pytest.raises(UserError, match=f"^model.implementation: .*{pattern}"):
        engine.check_engine(config, plan, torch.device("cuda"))
    with pytest.raises(UserError, match="runs on CUDA and not on cpu"):
        engine.check_engine(config, plan, torch.device("cpu"))
    config = compose(["model=tiny", ENGINE, "precision=fp8", "train.eval_bf16=false"])
    engine.check_engine(config, plan_of(config), torch.device("cuda"))


# The names that megatron-core's extension takes from the package, as plain torch modules.
STAND_IN = {
    "__init__.py": '__version__ = "1.8.0"\nfrom . import common, pytorch\n',
    "common/__init__.py": "from . import recipe\n",
    "common/recipe.py": '''
class DelayedScaling:
    def __init__(self, **kwargs): self.kwargs = kwargs
class Format:
    E4M3, HYBRID = "e4m3", "hybrid"
''',
    "pytorch/__init__.py": '''
import torch
import torch.nn.functional as F
from . import distributed, fp8, optimizers

class Linear(torch.nn.Module):
    def __init__(self, in_features, out_features, *, init_method, bias, return_bias, parallel_mode,
                 params_dtype, device, tp_size, **other):
        super().__init__()
        assert tp_size == 1
        self.return_bias, self.parallel_mode, self.use_bias = return_bias, parallel_mode, bias
        self.in_features, self.out_features = in_features, out_features
        like = dict(dtype=params_dtype, device=device)
        self.weight = torch.nn.Parameter(torch.empty(out_features, in_features, **like))
        init_method(self.weight)
        self.bias = torch.nn.Parameter(torch.zeros(out_features, **like)) if bias else None
    def get_extra_state(self): return torch.empty(0, dtype=torch.uint8)
    def set_extra_state(self, state): assert state is None or state.numel() == 0
    def forward(self, x, is_first_microbatch=None):
        out = F.linear(x, self.weight, None if self.return_bias else self.bias)
        return (out, self.bias) if self.return_bias else out

class LayerNormLinear(Linear):
    def __init__(self, in_features, out_features, *, eps, normalization, zero_centered_gamma, **other):
        super().__init__(in_features, out_features, **other)
        self.eps, self.normalization = eps, normalization
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(in_features, dtype=self.weight.dtype))
        self.layer_norm_bias = None
        if normalization == "LayerNorm":
            self.layer_norm_bias = torch.nn.Parameter(torch.zeros(in_features, dtype=self.weight.dtype))
    def forward(self, x, is_first_microbatch=None):
        shape = (x.shape[-1],)
        if self.normalization == "RMSNorm":
            x = F.rms_norm(x, shape, self.layer_norm_weight, self.eps)
        else:
            x = F.layer_norm(x, shape, self.layer_norm_weight, self.layer_norm_bias, self.eps)
        return super().forward(x)

class RMSNorm(torch.nn.Module):
    def __init__(self, hidden_size, eps, *, params_dtype, device, **other):
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.ones(hidden_size, dtype=params_dtype)), eps
    def forward(self, x): return F.rms_norm(x, (x.shape[-1],), self.weight, self.eps)

class LayerNorm(RMSNorm):
    def __init__(self, hidden_size, eps, *, params_dtype, **other):
        super().__init__(hidden_size, eps, params_dtype=params_dtype, **other)
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, dtype=params_dtype))
    def forward(self, x): return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)

class DotProductAttention(torch.nn.Module):
    def __init__(self, attn_mask_type, **other):
        super().__init__()
        assert attn_mask_type == "causal"
    def forward(self, q, k, v, mask=None, **other):
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.permute(2, 0, 1, 3).flatten(2)
''',
    "pytorch/distributed.py": '''
class CudaRNGStatesTracker:
    pass
activation_recompute_forward = None
''',
    "pytorch/fp8.py": '''
from contextlib import nullcontext
class FP8GlobalStateManager:
    @staticmethod
    def is_fp8_enabled(): return False
def fp8_autocast(**kwargs): return nullcontext()
def fp8_model_init(**kwargs): return nullcontext()
''',
    "pytorch/cpp_extensions.py": "cast_to_fp8 = None",
    "pytorch/float8_tensor.py": "class Float8Tensor: pass",
    "pytorch/optimizers.py": '''
import torch
class FusedAdam(torch.optim.AdamW): pass
class FusedSGD(torch.optim.SGD): pass
''',
}  # fmt: skip

SCRIPT = """
import sys
from pathlib import Path
import torch
from fp4pretrain.config import compose
from fp4pretrain.infer import load_model
from fp4pretrain.model.layout import check_layout
from fp4pretrain.parallel.groups import join, leave
from fp4pretrain.train import checkpoint
from fp4pretrain.train.run_dir import CHECKPOINTS, prepare
from fp4pretrain.train.step import train_step
from fp4pretrain.train.stored import stored_run
from fp4pretrain.train.trainer import build_trainer, unwrapped

shape = (
    "model.num_layers=2 model.hidden_size=64 model.num_attention_heads=4 model.num_query_groups=2 "
    "model.ffn_hidden_size=96 model.seq_length=32 model.kv_channels=null precision=bf16 data=mock "
    "model.vocab_size=257 "
    "train.steps=9 train.micro_batch=2 train.global_batch=2 parallel.device=cpu optim.warmup=0 "
    "optim.decay=0.2"
).split()
world = join(device=torch.device("cpu"), seed=1)
ids = torch.randint(257, (2, 32), generator=torch.Generator().manual_seed(1))
where = torch.arange(32).expand(2, -1)
losses, logits = {}, {}
for name in ("fp4pretrain", "transformer_engine"):
    config = compose([*sys.argv[2:], *shape, f"model.implementation={name}"])
    trainer = build_trainer(config, world, check_layout(config, 1))
    gpt = unwrapped(trainer.chunks[0])
    with torch.no_grad():
        logits[name] = gpt(ids, where, attention_mask=None).float()
    losses[name] = [train_step(trainer, trainer.batches(trainer.consumed_samples))["loss"] for _ in range(3)]
kinds = {type(m).__name__ for m in gpt.decoder.modules()}
assert {"TELayerNormColumnParallelLinear", "TERowParallelLinear", "TEDotProductAttention"} <= kinds, kinds
assert not any("Quant" in kind for kind in kinds)
print(trainer.backend_choice)
close = lambda a, b: float((a - b).norm() / b.norm())
print("logits differ by", close(logits["transformer_engine"], logits["fp4pretrain"]))
print("losses", losses)
gaps = [abs(a / b - 1) for a, b in zip(*losses.values())]
assert close(logits["transformer_engine"], logits["fp4pretrain"]) < 0.02 and max(gaps) < 5e-3
# its checkpoint has our names: our modules read it
run = Path(sys.argv[1]) / "run"
prepare(run, config, plan_text="", unigram_entropy=1.0, fingerprint={})
path = checkpoint.save(trainer, run / CHECKPOINTS, keep_last=1)
with torch.no_grad():
    last = gpt.eval()(ids, where, attention_mask=None)[..., :257].float()
again = build_trainer(config, world, check_layout(config, 1))
checkpoint.load(again, path)
with torch.no_grad():
    found = unwrapped(again.chunks[0]).eval()(ids, where, attention_mask=None)[..., :257].float()
assert torch.equal(found, last)
ours = load_model(stored_run(run), device="cpu").logits(ids)
assert close(ours, last) < 0.02, close(ours, last)
"""


@pytest.mark.parametrize("model", [["model=tiny"], ["model=gpt_345m"]], ids=",".join)
def test_megatron_cores_own_spec_is_our_model(tmp_path: Path, model: list[str]) -> None:
    """The same initial weights, logits and losses within BF16, and checkpoints with our names."""
    for name, text in STAND_IN.items():
        path = tmp_path / "transformer_engine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tmp_path / "script.py").write_text(SCRIPT)
    root = Path(__file__).parents[3]
    environment = os.environ | {
        "PYTHONPATH": f"{tmp_path}:{root}:{root / 'kernels'}",
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path), *model],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "blocks of Transformer Engine's modules (bf16)" in done.stdout
