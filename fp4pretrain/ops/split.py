"""Operands that are sums of terms, each cast alone: the mean and what remains, hot channels.

    split      terms of an operand made from x                                     source
    mean       the mean over tokens (as a matrix of equal rows), x minus it        arXiv:2603.10444
    channels   the cast of x; what that cast lost, in the channels of the          arXiv:2602.02047
               contraction axis that lost most, zeros elsewhere

Splitting happens above the backends: they cast terms and multiply pairs of terms as they do whole
operands, so every backend has both. A product of sums is the sum of all products of terms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fp4pretrain.numerics import derive_key
from fp4pretrain.ops.casts import Cast
from fp4pretrain.ops.operand import Operand

Make = Callable[[Tensor, Sequence[Cast]], Sequence[Operand]]
# Terms draw noise of their own: a site's key and the number of the term.
_TERM = 0x7E


@dataclass
class SumOperand(Operand):
    """One side of a GEMM as a sum of operands of one shape."""

    TENSORS: ClassVar[tuple[str, ...]] = ()
    terms: tuple[Operand, ...]

    @property
    def shape(self) -> tuple[int, int]:  # type: ignore[override]
        return self.terms[0].shape

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Those of all terms, in order."""
        return tuple(t for term in self.terms for t in term.tensors())

    def filled(self, tensors: tuple[Tensor | None, ...]) -> Operand:
        """See ``Operand.filled``."""
        terms, start = [], 0
        for term in self.terms:
            end = start + len(term.TENSORS)
            terms.append(term.filled(tensors[start:end]))
            start = end
        return SumOperand(tuple(terms))

    def hollow(self) -> Operand:
        """See ``Operand.hollow``."""
        return SumOperand(tuple(term.hollow() for term in self.terms))

    def dequantize(self) -> Tensor:
        """fp32 [rows, k]: the sum of the terms."""
        return torch.stack([term.dequantize() for term in self.terms]).sum(dim=0)

    def transposed(self) -> Operand | None:
        """See ``Operand.transposed``: where every term has one."""
        turned = [term.transposed() for term in self.terms]
        found = tuple(term for term in turned if term is not None)
        return SumOperand(found) if len(found) == len(turned) else None


def split_operand(x: Tensor, cast: Cast, make: Make) -> SumOperand:
    """The operand of x [rows, cols] by a cast whose spec splits; ``make`` casts one term."""
    whole = replace(cast, spec=replace(cast.spec, split="none"))
    if cast.spec.split == "mean":
        mean = x.float().mean(dim=0, keepdim=True).to(x.dtype)
        parts = [x - mean, mean.expand_as(x).contiguous()]
        terms = [make(p, [_of_term(whole, i)])[0] for i, p in enumerate(parts)]
        return SumOperand(tuple(terms))
    first = make(x, [whole])[0]
    lost = _oriented(x, whole, first.shape) - first.dequantize()
    count = max(1, math.ceil(cast.spec.channels * lost.shape[1]))
    scores = lost.abs().sum(dim=0)
    hot = torch.zeros_like(scores).index_fill_(0, scores.topk(count).indices, 1.0)
    along = replace(_of_term(whole, 1), transpose=False, multiple=1)
    return SumOperand((first, make(lost * hot, [along])[0]))


def pairs(a: Operand, b: Operand) -> list[tuple[Any, Any]]:
    """All pairs of terms whose products make a @ b.T."""
    a_terms = a.terms if isinstance(a, SumOperand) else (a,)
    b_terms = b.terms if isinstance(b, SumOperand) else (b,)
    return [(first, second) for first in a_terms for second in b_terms]


def _of_term(cast: Cast, term: int) -> Cast:
    if term == 0 or cast.noise is None:
        return cast
    return replace(cast, noise=replace(cast.noise, key=derive_key(cast.noise.key, _TERM, term)))


def _oriented(x: Tensor, cast: Cast, shape: tuple[int, int]) -> Tensor:
    """fp32 x, turned as the cast says, with the zeros that pad its contraction axis."""
    turned = (x.t() if cast.transpose else x).float()
    return F.pad(turned, (0, shape[1] - turned.shape[1]))
