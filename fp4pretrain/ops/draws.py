"""Noise keys and rotation signs of a captured step, in a table on the device.

A CUDA graph replays launches with the arguments that they were captured with, so what changes from step to
step cannot be an argument. While a step is rehearsed and captured, every cast that draws asks for a row
here, in an order that is the same each time; the kernels read the row. Before each replay the rows are
filled with what `Moment` would have drawn: the same noise as without a graph, bit for bit.

    row      int64 [4]: noise key, sign bits 0 to 63, sign bits 64 to 127 (`Copy.draw` of the kernels), unused
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fp4pretrain.numerics import derive_keys, random_sign_words, signs_te
from fp4pretrain.ops.keys import (
    NOISE_STREAM,
    SIGNS_STREAM,
    Moment,
    Site,
    microbatch_of,
    sign_path,
)
from fp4pretrain.precision import Rotation

_CHUNK = 1024  # rows that are allocated at once
_WORDS = 4


@dataclass(frozen=True)
class _Request:
    """What one row holds: of a site and a microbatch, its noise key, and the signs of ``rotation``."""

    site: Site
    microbatch: int
    noise_microbatch: int
    rotation: Rotation | None


class Draws:
    """The rows that one captured step reads, on one device. Every step must cast the same: a request that
    differs from the rehearsed one raises RuntimeError."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._requests: list[_Request] = []
        self._chunks: list[Tensor] = []
        self._next = 0
        self._rehearsed = False
        self._prepared: tuple[int, int, Tensor] | None = None  # seed, step, words

    def __len__(self) -> int:
        return len(self._requests)

    def begin(self) -> None:
        """Call when a rehearsed step is run again to be captured: requests are counted from the first one
        again."""
        if self._rehearsed and self._next != len(self._requests):
            raise RuntimeError(f"a step asked for {self._next} draws of {len(self._requests)}")
        self._rehearsed = True
        self._next = 0

    def row(self, moment: Moment, site: Site, rotation: Rotation | None) -> Tensor:
        """The row of one cast, filled for ``moment`` at the rehearsal; ``rotation``: whose signs it needs."""
        wanted = _Request(site, moment.microbatch, microbatch_of(moment, site), rotation)
        number, self._next = self._next, self._next + 1
        if self._rehearsed:
            if number >= len(self._requests) or self._requests[number] != wanted:
                raise RuntimeError(f"draw {number} of a captured step is not the rehearsed one")
            return self._at(number)
        if number % _CHUNK == 0:
            # not inside a capture: the rehearsal allocates
            self._chunks.append(torch.zeros(_CHUNK, _WORDS, dtype=torch.int64, device=self._device))
        self._requests.append(wanted)
        row = self._at(number)
        row.copy_(_words([wanted], moment.seed, moment.step)[0])
        return row

    def prepare(self, seed: int, step: int) -> None:
        """Compute a step's rows on the host, while the device is busy with the step before."""
        if not self._requests:
            return
        words = _words(self._requests, seed, step)
        self._prepared = seed, step, words.pin_memory() if self._device.type == "cuda" else words

    def fill(self, seed: int, step: int) -> None:
        """Copy a step's rows to the device, in the order of its stream."""
        if not self._requests:
            return
        if self._prepared is None or self._prepared[:2] != (seed, step):
            self.prepare(seed, step)
        assert self._prepared is not None
        words = self._prepared[2]
        for number, chunk in enumerate(self._chunks):
            part = words[number * _CHUNK : (number + 1) * _CHUNK]
            chunk[: len(part)].copy_(part, non_blocking=True)

    def _at(self, number: int) -> Tensor:
        return self._chunks[number // _CHUNK][number % _CHUNK]


def _words(requests: list[_Request], seed: int, step: int) -> Tensor:
    """int64 [requests, 4] as of a step."""
    paths = torch.tensor([(r.noise_microbatch, *r.site.path) for r in requests])
    words = torch.zeros(len(requests), _WORDS, dtype=torch.int64)
    words[:, 0] = derive_keys(seed, NOISE_STREAM, step, *paths.unbind(1))
    drawn: dict[tuple[int, int], list[tuple[int, tuple[int, ...]]]] = {}
    for number, request in enumerate(requests):
        rotation = request.rotation
        if rotation is None:
            continue
        if rotation.signs == "te":
            bits = sum(1 << j for j, sign in enumerate(signs_te()) if sign < 0)
            words[number, 1] = bits
            continue
        path = sign_path(rotation, request.site, step, request.microbatch)
        drawn.setdefault((rotation.size, len(path)), []).append((number, path))
    for (size, length), found in drawn.items():
        numbers = torch.tensor([number for number, _ in found])
        columns = torch.tensor([path for _, path in found]).reshape(len(found), length)
        keys = derive_keys(seed, SIGNS_STREAM, *columns.unbind(1)).expand(len(found))
        words[numbers, 1], words[numbers, 2] = random_sign_words(keys, size)
    return words
