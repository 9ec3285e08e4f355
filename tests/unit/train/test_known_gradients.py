"""The gradient that a step knows beforehand is the one that its losses get."""

from __future__ import annotations

import pytest
import torch

from fp4pretrain.train.step import known_gradients, masked_mean


@pytest.mark.parametrize("counted", [0, 1, 13, 24])
def test_known_gradients_are_those_that_arrive_but_for_rounding(counted: int) -> None:
    mask_bs = (torch.arange(24) < counted).float().view(3, 8)
    losses_bs = torch.rand(3, 8, requires_grad=True)
    loss, _ = masked_mean(mask_bs, losses_bs)
    loss /= 7  # as megatron-core's schedule does, in place
    loss.backward()
    assert losses_bs.grad is not None
    # the limit under which the kernels take both for one number
    torch.testing.assert_close(known_gradients(mask_bs, 7), losses_bs.grad, rtol=2**-21, atol=0)
