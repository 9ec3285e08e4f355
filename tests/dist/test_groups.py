"""Models of one process share their groups where their layouts are alike, and end them where they are not."""

from __future__ import annotations

import pytest
from agreement import SMALL

pytestmark = pytest.mark.xdist_group("ranks")


def test_groups_of_equal_sizes_stay_and_others_end(ranks) -> None:
    run = [*SMALL, "precision=bf16", "parallel.tensor=2"]
    first, again, other = ranks.run("group_tasks.twice", run, size=2)["found"]
    assert first[:2] == [2, 1] and again == first
    assert other[:2] == [1, 2] and other[2] <= first[2]
