"""The announced memory: a preset's parameters times the bytes of each, and a GPU that is too small.

What ranks really hold is compared in tests/dist/test_reshard.py.
"""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch

from fp4pretrain.config import compose
from fp4pretrain.errors import UserError
from fp4pretrain.model.layout import check_layout
from fp4pretrain.model.memory import check_fits, parameters_of_stage, state_bytes


@pytest.mark.parametrize(("preset", "millions"), [("llama3_8b", 8030.3), ("gpt_1_3b", 1315.8)])
def test_one_rank_holds_every_parameter(preset: str, millions: float) -> None:
    config = compose([f"model={preset}"])
    assert parameters_of_stage(config, 0) / 1e6 == pytest.approx(millions, abs=0.2)
    state = state_bytes(config, check_layout(config, 1))
    assert state.total == parameters_of_stage(config, 0) * (2 + 4 + 4 + 8)


def test_a_gpu_that_is_too_small_is_refused_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = SimpleNamespace(total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    config = compose(["model=llama3_8b", "parallel.tensor=2"])
    state = state_bytes(config, check_layout(config, 2))
    check_fits(state, torch.device("cuda", 0))
    alone = compose(["model=llama3_8b"])
    state = state_bytes(alone, check_layout(alone, 1))
    pattern = r"parallel.tensor: .* takes 134\.\d+ GiB a rank .*, and this GPU has 80 GiB; raise"
    with pytest.raises(UserError) as caught:
        check_fits(state, torch.device("cuda", 0))
    assert re.match(pattern, str(caught.value))
    check_fits(state, torch.device("cpu"))
