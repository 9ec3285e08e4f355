"""What one rank finds wrong is every rank's error, said where it belongs, before any group is formed."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from fp4pretrain.errors import UserError
from fp4pretrain.parallel.agreement import Meeting, Said, raise_first
from fp4pretrain.sweep.planning import _unequal


def meet(
    size: int, ask: Callable[[Meeting], Any], *, absent: tuple[int, ...] = ()
) -> list[UserError | Any]:
    """What ``ask`` gives or raises on each of ``size`` ranks, which meet at one store."""
    from datetime import timedelta

    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=1 if absent else 60))
    results: list[Any] = [None] * size

    def rank(number: int) -> None:
        try:
            results[number] = ask(Meeting(store, number, size))
        except UserError as error:
            results[number] = error

    threads = [threading.Thread(target=rank, args=(n,)) for n in range(size) if n not in absent]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def stated(**changes: Any) -> dict[str, Any]:
    configs = [{"optim.lr": 1e-3, "precision.fprop.x.format": "nvfp4"} | changes]
    return {"code": ["0.1.0", "abc"], "configs": configs, "names": [["a"]], "problems": [None]}


def test_ranks_that_agree_get_the_main_rank_s_words() -> None:
    """Names with the time in them, say."""
    found = meet(
        3, lambda m: m.agree(None, stated() | {"names": [[f"run{m.rank}"]]}, judge=_unequal)
    )
    assert [one["names"] for one in found] == [[["run0"]]] * 3


def test_a_combination_that_one_rank_alone_cannot_compose_stops_all() -> None:
    """A file of the user's that one node lacks, say; what no rank can compose costs its own run."""

    def ask(m: Meeting) -> Any:
        lacks = ["precision: a.yaml is no file", None] if m.rank else [None, None]
        return m.agree(None, stated() | {"problems": lacks}, judge=_unequal)

    assert [str(one) for one in meet(2, ask)] == [
        "precision: a.yaml is no file (rank 1 on " + socket.gethostname() + ")",
        "precision: a.yaml is no file",
    ]


@pytest.mark.parametrize("odd", [1, 2])
def test_a_rank_with_other_keys_stops_all(odd: int) -> None:
    def ask(m: Meeting) -> Any:
        mine = stated(**({"optim.lr": 2e-3} if m.rank == odd else {}))
        return m.agree(None, mine, judge=_unequal)

    found = meet(3, ask)
    assert all(isinstance(one, UserError) for one in found)
    assert str(found[0]).startswith("optim.lr: 0.002 here and 0.001 on the main rank")
    assert f"(rank {odd} on " in str(found[0])
    assert [one.shown for one in found] == [True, False, False]  # one node


def test_other_code_and_other_numbers_of_runs_are_told_apart() -> None:
    other = stated() | {"code": ["0.1.0", "xyz"]}
    assert "launch: code 0.1.0 xyz here and 0.1.0 abc" in _unequal([stated(), other])[1]
    two = stated()
    two["configs"] = two["configs"] * 2
    assert "2 runs here and 1" in _unequal([stated(), stated(), two])[2]
    assert _unequal([stated(), stated()]) == {}


def test_a_rank_s_own_mistake_stops_all_at_once() -> None:
    problem = UserError("data.path: nowhere.idx is missing")
    found = meet(3, lambda m: m.agree(problem if m.rank == 2 else None, None, judge=lambda _: {}))
    assert [str(one).split(" (")[0] for one in found] == [str(problem)] * 3


def test_a_rank_that_never_comes_is_named() -> None:
    found = meet(2, lambda m: m.agree(None, None, judge=lambda _: {}), absent=(1,))
    assert str(found[0]).startswith("launch: rank 1 of 2 did not come")


def test_several_agreements_do_not_mix() -> None:
    def ask(m: Meeting) -> Any:
        return [m.agree(None, [m.rank, n], judge=lambda _: {}) for n in range(3)]

    assert meet(2, ask) == [[[0, 0], [0, 1], [0, 2]]] * 2


@pytest.mark.parametrize(
    ("troubled", "speaking"),
    [
        ({0: "x", 1: "x", 2: "x", 3: "x"}, {0, 2}),  # all nodes: one line on each
        ({2: "y", 3: "y"}, {0, 2}),  # the second node: there and on the main one
        ({3: "y"}, {0, 3}),
        ({1: "z"}, {0}),  # on the main rank's node: once
    ],
)
def test_a_line_is_said_once_on_each_node_that_it_concerns(
    troubled: dict[int, str], speaking: set[int]
) -> None:
    """Ranks 0 and 1 are one node, 2 and 3 another."""
    nodes = [str(rank // 2) for rank in range(4)]
    found = {rank: Said(nodes[rank], "h", line) for rank, line in troubled.items()}
    found.setdefault(0, Said("0", "h", None))
    spoke = set()
    for rank in range(4):
        with pytest.raises(UserError) as caught:
            raise_first(found, rank=rank, own=Said(nodes[rank], "h", troubled.get(rank)))
        if caught.value.shown:
            spoke.add(rank)
    assert spoke == speaking
