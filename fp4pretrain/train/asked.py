"""What is asked of a run from outside: signals, and a time that is over.

Ranks hear of it at slightly different moments. What every rank has heard by a step's update travels with
the numbers of that step, so all of them know the same of it, and no collective is made for it alone.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence

import torch

TIME = 1  # the time is over; below every signal's number, since a signal counts for more
SIGNALS = (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM)
KINDS = (TIME, *(int(number) for number in SIGNALS))  # in their order


class Asked:
    """The numbers that may be asked, and a place for them on the device.

    Args:
        kinds: the numbers, ascending; where several are asked the largest counts.
        device: where a step's numbers are added up.
    """

    def __init__(self, kinds: Sequence[int], device: torch.device) -> None:
        self._kinds = kinds
        self.here: Callable[[], int] = lambda: 0  # what this rank is asked now, 0 for nothing
        self.flags = torch.zeros(len(kinds), dtype=torch.float64, device=device)

    def fill(self) -> None:
        """Put what this rank is asked where the next update reads it, without waiting for the device."""
        self.flags.zero_()
        number = self.here()
        if number:
            self.flags[self._kinds.index(number)] = 1.0

    def most(self, counts: Sequence[float]) -> int:
        """The largest number that any rank was asked, of the sum of all ranks' flags; 0 for none."""
        return max((kind for kind, n in zip(self._kinds, counts, strict=True) if n), default=0)
