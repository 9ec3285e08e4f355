"""A run's folder with one checkpoint of a small model, made without training."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fp4pretrain.config import compose
from fp4pretrain.model.layout import check_layout
from fp4pretrain.nn.linear import QuantLinear
from fp4pretrain.ops.reference import EmulatedOperand, ReferenceBackend
from fp4pretrain.parallel.groups import join, leave, pick_device
from fp4pretrain.train import checkpoint
from fp4pretrain.train.run_dir import CHECKPOINTS, prepare
from fp4pretrain.train.trainer import Trainer, build_trainer, unwrapped

# The kinds of the presets are theirs; only sizes shrink.
SMALL = (
    "model.num_layers=2 model.hidden_size=64 model.num_attention_heads=4 model.ffn_hidden_size=96 "
    "model.seq_length=32 model.vocab_size=257 model.kv_channels=null model.init_std=0.1 data=mock "
    "train.steps=4 train.micro_batch=1 train.global_batch=1 parallel.device=cpu optim.decay=0.2 "
    "parallel.distributed_optimizer=false logging.wandb.mode=disabled optim.warmup=0"
).split()


class Exact(ReferenceBackend):
    """FP32 where the BF16 recipe would round: what another program's FP32 is compared with."""

    def quantize(self, x: torch.Tensor, casts: Any, *_: Any, **__: Any) -> list[Any]:
        return [EmulatedOperand(x.t() if cast.transpose else x, None) for cast in casts]


Make = Callable[..., tuple[Trainer, Path]]


@pytest.fixture(scope="session")
def small() -> list[str]:
    return SMALL


@pytest.fixture
def exactly() -> Callable[[Any], None]:
    """Make a GPT compute in FP32."""

    def swap(gpt: Any) -> None:
        for linear in (one for one in gpt.modules() if isinstance(one, QuantLinear)):
            linear.bind(replace(linear.bound, backend=Exact()))

    return swap


def _make(run: Path, *overrides: str) -> tuple[Trainer, Path]:
    config = compose([*SMALL, "precision=bf16", *overrides])
    world = join(device=pick_device("cpu"), seed=config.seed)
    trainer = build_trainer(config, world, check_layout(config, 1))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in unwrapped(trainer.chunks[0]).parameters():
            noise = torch.empty(parameter.shape).normal_(0, 0.1, generator=generator)
            parameter.add_(noise.to(parameter.dtype))
    trainer.optimizer.reload_model_params()
    trainer.clock.weights_changed()
    prepare(run, config, plan_text="", unigram_entropy=1.0, fingerprint={})
    checkpoint.save(trainer, run / CHECKPOINTS, keep_last=1)
    return trainer, run


@pytest.fixture(autouse=True)
def _groups() -> Iterator[None]:
    """End the groups of models that a test built, loaded or trained."""
    yield
    leave()


@pytest.fixture
def trained(tmp_path: Path) -> Make:
    """A run's folder with one checkpoint of a model whose every weight is drawn anew, norms too."""
    return lambda *overrides: _make(tmp_path / "run", *overrides)


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such a folder without overrides, made once: to read, or to copy."""
    folder = _make(tmp_path_factory.mktemp("plain") / "run")[1]
    leave()
    return folder


@pytest.fixture
def run(plain: Path, tmp_path: Path) -> Path:
    """A copy of the plain run, to write into."""
    return shutil.copytree(plain, tmp_path / "run")
