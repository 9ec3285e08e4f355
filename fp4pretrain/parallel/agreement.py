"""Ranks that agree before they go on: what one rank finds wrong is every rank's error, and at once.

Without it a rank that stops leaves the others waiting in a collective until it times out, and where
ranks were started with other keys or other code the run is recorded as if all had been the main one.

``Meeting`` needs no process group, only the store at which the ranks meet: so it comes before there is
a device, and serves ranks that cannot form a group. ``agree`` is for the time after.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from fp4pretrain.errors import UserError

_T = TypeVar("_T")
_TO_LEAVE = timedelta(seconds=10)  # for the others to read what the main rank said, before it ends


@dataclass(frozen=True)
class Said:
    """What one rank has to say: its node, its host, its problem (None: it is ready), a payload."""

    node: str
    host: str
    problem: str | None
    payload: Any = None


@dataclass
class Meeting:
    """All ranks at one store. Every rank calls ``agree``, the same number of times."""

    store: dist.Store
    rank: int
    size: int
    _count: int = 0

    def agree(
        self,
        problem: UserError | None,
        payload: Any,
        *,
        judge: Callable[[Sequence[Any]], Mapping[int, str]],
    ) -> Any:
        """The main rank's payload. Raises UserError on every rank where any rank has a problem, or
        where ``judge``, which the main rank asks of all payloads, finds one: rank -> line."""
        self._count += 1
        key = f"agreement/{self._count}"
        self.store.set(f"{key}/{self.rank}", json.dumps(asdict(say(problem, payload))))
        if self.rank == 0:
            self.store.set(f"{key}/verdict", json.dumps(self._verdict(key, judge)))
        said, main = json.loads(self.store.get(f"{key}/verdict"))
        found = {int(number): Said(**one) for number, one in said.items()}
        self.store.set(f"{key}/{self.rank}/read", "1")
        if found and self.rank == 0:  # it may host the store: it leaves last
            with suppress(Exception):  # a rank that is gone has read enough
                read = [f"{key}/{other}/read" for other in range(self.size)]
                self.store.wait(read, _TO_LEAVE)
        raise_first(found, rank=self.rank, own=say(problem))
        return main

    def _verdict(
        self, key: str, judge: Callable[[Sequence[Any]], Mapping[int, str]]
    ) -> tuple[dict[int, dict[str, Any]], Any]:
        """What is wrong, by rank (the main rank is always among them, for its node), and the main
        rank's payload."""
        said = []
        for other in range(self.size):
            try:
                said.append(Said(**json.loads(self.store.get(f"{key}/{other}"))))
            except Exception as error:  # torch has no class of its own for a store's timeout
                line = f"launch: rank {other} of {self.size} did not come ({type(error).__name__})"
                late = UserError(f"{line}; look at its node's output")
                return {0: asdict(say(late))}, None
        troubled = {number: one for number, one in enumerate(said) if one.problem is not None}
        if not troubled:
            wrong = judge([one.payload for one in said])
            troubled = {n: replace(said[n], problem=line) for n, line in wrong.items()}
        if troubled:
            troubled.setdefault(0, said[0])
        slim = {n: asdict(replace(one, payload=None)) for n, one in troubled.items()}
        return slim, said[0].payload


def say(problem: UserError | None, payload: Any = None) -> Said:
    """This rank's."""
    host = socket.gethostname()
    node = os.environ.get("GROUP_RANK", host)  # torchrun's number of the node
    return Said(node, host, None if problem is None else str(problem), payload)


def agree(problem: UserError | None) -> None:
    """Raise on every rank where any has a problem. Collective: every rank calls it; it waits for all.

    The rank that has the problem says it on its node, and the main rank says it with that rank's name.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        if problem is not None:
            raise problem
        return
    found: list[Any] = [None] * dist.get_world_size()
    mine = say(problem)
    dist.all_gather_object(found, mine)
    raise_first(dict(enumerate(found)), rank=dist.get_rank(), own=mine)


def raise_first(found: Mapping[int, Said], *, rank: int, own: Said) -> None:
    """Raise a UserError where any rank has a problem: a rank's own, or else the first one's.

    It is shown by the main rank, with the name of the rank it is from, and on every other node that
    has a problem by its first rank with one. ``found`` holds the troubled ranks, and rank 0 with them.
    """
    troubled = sorted(number for number, said in found.items() if said.problem is not None)
    if not troubled:
        return
    first = found[troubled[0]]
    if rank == 0:
        line = f"{first.problem}"
        if troubled[0] != 0:
            line += f" (rank {troubled[0]} on {first.host})"
        raise UserError(line, shown=True)
    of_node = [number for number in troubled if found[number].node == own.node]
    shown = own.node != found[0].node and of_node[:1] == [rank]
    mine = found[rank].problem if rank in found else None
    raise UserError(str(mine or first.problem), shown=shown)


def attempted(work: Callable[[], _T]) -> tuple[_T | None, UserError | None]:
    """What ``work`` returns, or the UserError it raises."""
    try:
        return work(), None
    except UserError as error:
        return None, error
