"""Weights that the distributed optimizer wrote a part of on each data-parallel rank, and when they are whole.

With ``parallel.overlap`` an update ends without gathering them. The next forward pass does, a bucket ahead of
the modules that read it (megatron-core's hooks, ``overlap_param_gather``), beside the GEMMs before them. What
reads weights between two steps gathers them first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron.core.distributed import DistributedDataParallel


def forget_gathered(chunks: Sequence[DistributedDataParallel]) -> None:
    """Have the next forward pass gather all weights: each rank's part of them may have changed."""
    for group in _groups(chunks):
        group.param_gather_dispatched = False


def gather(chunks: Sequence[DistributedDataParallel]) -> None:
    """Gather what no forward pass has gathered since, and wait. Collective over data-parallel ranks."""
    for group in _groups(chunks):
        if not group.param_gather_dispatched or group.param_gather_handle is not None:
            group.start_param_sync(force_sync=True)


def _groups(chunks: Sequence[DistributedDataParallel]) -> Iterator:
    """Those bucket groups whose gathering overlaps."""
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            yield from chunk.bucket_groups
