"""The whole weights of a checkpoint, whatever layout wrote it, one tensor at a time."""

from __future__ import annotations

from pathlib import Path

import torch

from fp4pretrain.errors import UserError
from fp4pretrain.train.checkpoint import Damaged, read_manifest, read_part
from fp4pretrain.train.checkpoint.files import Tensor, check_file

_MASTER = "optimizer.state.param."


class CheckpointWeights:
    """Reads the tensors of one checkpoint folder. ``masters``: FP32 masters, where there are any.

    Raises UserError, here and while reading, where a file is not what was written.
    """

    def __init__(self, folder: Path, *, masters: bool) -> None:
        self.folder = folder
        self._masters = masters
        try:
            self._manifest = read_manifest(folder)
            for name in sorted(self._manifest.files):
                check_file(folder, name, self._manifest)
        except Damaged as damage:
            raise self._damaged(damage) from None

    def has(self, key: str) -> bool:
        return key in self._manifest.tensors

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor of the model; the blocks' have the block as first axis."""
        kinds = ("embedding.", "decoder.", "output_layer.")
        return {k: t.shape for k, t in self._manifest.tensors.items() if k.startswith(kinds)}

    def whole(self, key: str) -> torch.Tensor:
        """A tensor outside the blocks."""
        stored = self._stored(key)
        return self._read(stored, (0,) * len(stored.shape), stored.shape)

    def of_layer(self, name: str, layer: int) -> torch.Tensor:
        """``name`` (``mlp.linear_fc2.weight``) of one block; all blocks' are one tensor."""
        stored = self._stored(f"decoder.layers.{name}")
        shape = stored.shape[1:]
        return self._read(stored, (layer,) + (0,) * len(shape), (1, *shape))[0]

    def _stored(self, key: str) -> Tensor:
        tensors = self._manifest.tensors
        found = tensors.get(_MASTER + key) if self._masters else None
        found = found or tensors.get(key)
        if found is None:
            raise self._damaged(Damaged(f"{key} is not in it"))
        return found

    def _read(
        self, stored: Tensor, offset: tuple[int, ...], shape: tuple[int, ...]
    ) -> torch.Tensor:
        out = torch.empty(shape, dtype=stored.dtype, device="cpu")
        try:
            read_part(self.folder, stored, offset=offset, out=out)
        except Damaged as damage:
            raise self._damaged(damage) from None
        return out

    def _damaged(self, damage: Damaged) -> UserError:
        return UserError(f"{self.folder} is damaged ({damage}); take another checkpoint")
