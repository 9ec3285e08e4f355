"""Memory for the amaxes that kernels leave: zeros that are handed out once."""

from __future__ import annotations

import torch

from fp4pretrain.ops import handed
from fp4pretrain.ops.handed import Awaited
from fp4pretrain.ops.keys import Site

CPU = torch.device("cpu")
AWAITED = Awaited(((Site(0, 0, "fprop", "x"), handed.Turn(0, None)),))


def test_no_two_tensors_leave_their_amaxes_in_one_place() -> None:
    """Over more than one fill, each place at a multiple of 16 bytes: another would compile another kernel."""
    handed.fresh_zeros()
    places = [AWAITED.leave(CPU).out for _ in range(2 * handed._ZEROS + 1)]
    for number, place in enumerate(places):
        assert place.shape == (2,)
        assert not place.any()
        place.fill_(number + 1)
    assert [int(place[0]) for place in places] == list(range(1, len(places) + 1))
    assert all(place.data_ptr() % 16 == 0 for place in places)


def test_a_captured_step_is_given_memory_of_its_own() -> None:
    before = AWAITED.leave(CPU).out
    handed.fresh_zeros()
    after = AWAITED.leave(CPU).out
    assert before.untyped_storage().data_ptr() != after.untyped_storage().data_ptr()


def test_an_evaluation_may_be_the_first_that_asks() -> None:
    handed.fresh_zeros()
    with torch.inference_mode():
        first = AWAITED.leave(CPU).out
    assert not first.is_inference()
    assert not AWAITED.leave(CPU).amaxes.is_inference()
