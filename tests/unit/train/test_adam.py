"""Whose Adam a run takes, with stand-ins that have the names and the interface of the fused ones: NVIDIA's
apex itself is not on the index (the apex that is there is another project)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fp4pretrain.nvidia import why_no_apex
from fp4pretrain.train import adam
from fp4pretrain.train.adam import adam_here

APEX = '''
"""The interface of NVIDIA's apex: moments in the state, the step in the group, CUDA alone by default."""
import torch

ON_CPU = False


class FusedAdam(torch.optim.Optimizer):
    def __init__(self, params, lr, betas, eps, weight_decay, adam_w_mode=True):
        assert adam_w_mode
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = step = group.get("step", 0) + 1
            (b1, b2), lr = group["betas"], group["lr"]
            for p in (one for one in group["params"] if one.grad is not None):
                if not (ON_CPU or p.is_cuda):
                    raise RuntimeError("FusedAdam only supports CUDA")
                state = self.state[p]
                if not state:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                m, v = state["exp_avg"], state["exp_avg_sq"]
                p.mul_(1 - lr * group["weight_decay"])
                m.lerp_(p.grad, 1 - b1)
                v.mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2)
                p.sub_(lr / (1 - b1**step) * m / ((v / (1 - b2**step)).sqrt() + group["eps"]))


class FusedSGD(torch.optim.SGD):
    pass
'''

# Its kernels on lists of tensors, on CUDA alone.
AMP_C = """
def multi_tensor_l2norm(size, buffer, tensors, *rest):
    raise RuntimeError("multi_tensor_l2norm only supports CUDA")


multi_tensor_scale = multi_tensor_l2norm
"""
APPLY = """
def multi_tensor_applier(kernel, buffer, tensors, *rest):
    return kernel(65536, buffer, tensors, *rest)
"""

# Trains 2 + 2 steps, the second half from a checkpoint, with each Adam and each kind of optimizer.
SCRIPT = """
import sys
from pathlib import Path
import torch
from fp4pretrain.config import compose
from fp4pretrain.model.layout import check_layout
from fp4pretrain.parallel.groups import join
from fp4pretrain.train import checkpoint
from fp4pretrain.train.adam import adam_here, adam_of
from fp4pretrain.train.step import train_step
from fp4pretrain.train.trainer import build_trainer
from megatron.core import optimizer as megatron_optimizer  # after ours, which spare it PyTorch's compiler
from megatron.core.optimizer import distrib_optimizer
import apex.optimizers

print("here:", adam_here(torch.device("cuda")))
world = join(device=torch.device("cpu"), seed=1)
apex.optimizers.ON_CPU = True
FLAGS = (
    (megatron_optimizer, "USING_PYTORCH_OPTIMIZER", False),
    (distrib_optimizer, "HAVE_APEX_OR_TE", True),
    (distrib_optimizer, "USING_APEX_OPTIMIZER", True),
)
ON_CPUS = [getattr(module, name) for module, name, _ in FLAGS]


def losses(distributed, torchs):
    config = compose(
        "model=tiny model.num_layers=1 model.hidden_size=64 model.num_attention_heads=2 precision=bf16 "
        "model.ffn_hidden_size=64 model.seq_length=32 data=mock train.steps=9 train.micro_batch=2 "
        "train.global_batch=2 parallel.device=cpu optim.warmup=0 optim.decay=0.2".split()
        + [f"parallel.distributed_optimizer={distributed}"]
    )
    for (module, name, on_gpus), on_cpus in zip(FLAGS, ON_CPUS):
        setattr(module, name, on_cpus if torchs else on_gpus)
    trainer, folder = build_trainer(config, world, check_layout(config, 1)), Path(sys.argv[1], distributed)
    print("built:", adam_of(trainer.optimizer))
    found = []
    for half in range(2):
        if half:
            trainer = build_trainer(config, world, check_layout(config, 1))
            checkpoint.load(trainer, path)
        for _ in range(2):
            trainer.binding.apply(trainer.progress)
            found.append(train_step(trainer, trainer.batches(trainer.consumed_samples))["loss"])
        path = checkpoint.save(trainer, folder / str(torchs), keep_last=1)
    return found


for distributed in ("true", "false"):
    one, other = losses(distributed, True), losses(distributed, False)
    print("equal:", torch.allclose(torch.tensor(one), torch.tensor(other), rtol=1e-4), one, other)
"""


def _python(folder: Path, *arguments: str) -> str:
    root = Path(__file__).parents[3]
    environment = os.environ | {
        "PYTHONPATH": f"{folder}:{root}:{root / 'kernels'}",
        "PYTHONWARNINGS": "ignore",
    }
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def apex(tmp_path: Path) -> Path:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    (tmp_path / "apex" / "optimizers.py").write_text(APEX)
    (tmp_path / "apex" / "multi_tensor_apply.py").write_text(APPLY)
    (tmp_path / "amp_C.py").write_text(AMP_C)
    return tmp_path


def test_a_run_takes_apex_and_its_checkpoints_go_on(apex: Path) -> None:
    """With the distributed optimizer and without."""
    (apex / "script.py").write_text(SCRIPT)
    told = _python(apex, str(apex / "script.py"), str(apex)).splitlines()
    assert told[0] == "here: apex's FusedAdam"
    assert [line for line in told if line.startswith("built:")] == [
        "built: torch's AdamW", "built: apex's FusedAdam",
    ] * 2  # fmt: skip
    equal = [line for line in told if line.startswith("equal:")]
    assert len(equal) == 2
    assert all(line.startswith("equal: True") for line in equal), equal


def test_another_projects_apex_is_told_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    told = why_no_apex()
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    assert told is not None and "installed, without apex.optimizers" in told


def test_without_either_the_reasons_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "CUDA kernels" in adam_here(torch.device("cpu"))
    monkeypatch.setattr(adam, "why_no_engine", lambda: "Transformer Engine: install it")
    monkeypatch.setattr(adam, "why_no_apex", lambda: "apex: NVIDIA's")
    monkeypatch.setattr("megatron.core.optimizer.USING_PYTORCH_OPTIMIZER", True)
    reasons = "(no Transformer Engine: install it; no apex: NVIDIA's)"
    for reason, ours in (
        ("Triton is not installed", ""),
        (None, ", by our kernel unless train.fusion=never"),
    ):
        monkeypatch.setattr(adam, "without_triton", lambda reason=reason: reason)
        assert adam_here(torch.device("cuda")) == f"torch's AdamW{ours} {reasons}"
