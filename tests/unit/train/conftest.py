"""One small model in one process, for tests of checkpoints."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fp4pretrain.config import compose
from fp4pretrain.model.layout import check_layout
from fp4pretrain.parallel.groups import join, leave, pick_device
from fp4pretrain.train.trainer import Trainer, build_trainer

# The plain optimizer: the distributed one collects garbage, a quarter of a second, at every load.
TINY = (
    "model.num_layers=1 model.hidden_size=32 model.num_attention_heads=2 model.num_query_groups=2 "
    "model.ffn_hidden_size=64 model.seq_length=32 train.micro_batch=1 train.global_batch=1 "
    "train.steps=40 data.mock=true precision=bf16 parallel.distributed_optimizer=false "
    "parallel.device=cpu"
).split()


@pytest.fixture(scope="module")
def trainer() -> Iterator[Trainer]:
    config = compose(TINY)
    world = join(device=pick_device("cpu"), seed=config.seed)
    yield build_trainer(config, world, check_layout(config, 1))
    leave()
