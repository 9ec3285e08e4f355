"""A checkpoint of megatron-core (``torch_dist``: dist_checkpointing, Megatron-LM) as the start of a run.

    FOLDER/latest_checkpointed_iteration.txt   Megatron-LM's: which of the folders below is the newest
    FOLDER/iter_0000100/, or release/, or FOLDER itself
        metadata.json     written last: without it the save did not end
        .metadata         which box of which tensor lies where
        common.pt         the arguments of the model (from megatron-core 0.19 on in __0_0.distcp)
        __0_0.distcp …    the boxes

These are pickles. ``.metadata`` is read by a reader that knows seven classes and makes an empty shell of
everything else, the others by torch's ``weights_only`` reader: nothing that a file says is ever run.
"""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from fp4pretrain.config import ModelConfig
from fp4pretrain.errors import UserError, first_line
from fp4pretrain.model.megatron_names import (
    LAYERS,
    VOCABULARY,
    section_of,
    stored_name,
    stored_names,
)
from fp4pretrain.train.initial.refusals import another_model, damaged

TRACKER = "latest_checkpointed_iteration.txt"
DESCRIBED, COMMON, PLACES = "metadata.json", "common.pt", ".metadata"
_COMMON = MetadataIndex("common_state/shard_0_1")
# What a whole name of a model's tensor begins with: the rest is optimizer, generators, ...
_MODEL = ("embedding.", "decoder.", "output_layer.")
_CLASSES = {
    "torch": ("Size",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        "Metadata",
        "MetadataIndex",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
    ),
}


def is_megatron(folder: Path) -> bool:
    """Whether a folder says that it is a checkpoint of megatron-core, whole or not."""
    return any((folder / name).is_file() for name in (TRACKER, DESCRIBED, PLACES))


class MegatronSource:
    """The tensors of a checkpoint under our names.

    Raises UserError, here and while reading, where it is unfinished, damaged, or of another model.
    """

    def __init__(self, folder: Path, model: ModelConfig) -> None:
        self._folder = _newest(folder)
        self._model = model
        self._check_whole()
        described = _read_places(self._folder / PLACES)
        self._tensors: dict[str, TensorStorageMetadata] = {
            name: found
            for name, found in described.state_dict_metadata.items()
            if isinstance(found, TensorStorageMetadata) and name.startswith(_MODEL)
        }
        self._places = described.storage_data
        self._check_sizes()
        self._compare(self._arguments())

    def part(self, leaf: ShardedTensor) -> torch.Tensor:
        """This rank's part of one of the model's tensors, of the leaf's shape and dtype."""
        ahead = leaf.prepend_axis_num
        offset, shape = tuple(leaf.global_offset), tuple(leaf.global_shape)
        name = leaf.key
        if ahead:
            end = stored_name(name.removeprefix(LAYERS))
            name = LAYERS + end
            if name not in self._tensors:  # each block by itself
                name = f"{LAYERS}{offset[0]}.{end}"
                offset, shape = offset[ahead:], shape[ahead:]
            if name not in self._tensors:  # SwiGLU's gate or up projection
                half = shape[0] // 2
                name += "_w" if offset[0] < half else "_v"
                offset, shape = (offset[0] % half, *offset[1:]), (half, *shape[1:])
        stored = self._tensors.get(name)
        if stored is None:
            raise damaged(self._folder, f"{name} is not in it")
        flexible = name in VOCABULARY  # padded there as that program pads it
        if tuple(stored.size[1:] if flexible else stored.size) != (
            shape[1:] if flexible else shape
        ):
            raise damaged(self._folder, f"{name} is {list(stored.size)} and not {list(shape)}")
        local = tuple(leaf.local_shape)
        out = torch.zeros((1,) * (len(shape) - len(local)) + local, dtype=leaf.dtype, device="cpu")
        for chunk in stored.chunks:
            self._copy(name, chunk, offset, out)
        return out.view(local)

    def _copy(
        self, name: str, chunk: ChunkStorageMetadata, offset: tuple[int, ...], out: torch.Tensor
    ) -> None:
        """Into ``out``, which begins at ``offset``, what a chunk has of it."""
        here, there = [], []
        for begin, length, first, extent in zip(
            offset, out.shape, chunk.offsets, chunk.sizes, strict=True
        ):
            low, high = max(begin, first), min(begin + length, first + extent)
            if low >= high:
                return
            here.append(slice(low - begin, high - begin))
            there.append(slice(low - first, high - first))
        data = self._read(name, chunk)
        if tuple(data.shape) != tuple(chunk.sizes):
            raise damaged(self._folder, f"{name} is {list(data.shape)} at {list(chunk.offsets)}")
        out[tuple(here)] = data[tuple(there)].to(out.dtype)

    def _read(self, name: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        place = self._places.get(MetadataIndex(name, chunk.offsets))
        if place is None:
            raise damaged(self._folder, f"{name} at {list(chunk.offsets)} has no place")
        try:
            found = torch.load(self._bytes(place), map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
            raise damaged(self._folder, f"{place.relative_path}: {first_line(error)}") from None
        assert isinstance(found, torch.Tensor)
        return found

    def _bytes(self, place: Any) -> io.BytesIO:
        with (self._folder / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            return io.BytesIO(file.read(place.length))

    def _arguments(self) -> dict[str, Any]:
        """Megatron-LM's arguments; none where a program of its own saved the checkpoint."""
        path = self._folder / COMMON
        try:
            if path.is_file():
                found = torch.load(path, map_location="cpu", weights_only=True)
            elif _COMMON in self._places:  # megatron-core 0.19
                raw = self._bytes(self._places[_COMMON])
                (found,) = torch.load(raw, map_location="cpu", weights_only=True)
            else:
                found = {}
            return dict(vars(found["args"])) if "args" in found else {}
        except pickle.UnpicklingError as error:
            raise UserError(
                f"init: {self._folder} holds objects beside Megatron-LM's arguments, and no program of a "
                f"file is run ({first_line(error)}); save it with megatron-core's own classes alone"
            ) from None
        except Exception as error:  # an unpickler raises what it likes
            raise damaged(self._folder, f"arguments: {first_line(error)}") from None

    def _check_whole(self) -> None:
        try:
            described = json.loads((self._folder / DESCRIBED).read_text(encoding="utf-8"))
            backend = described["sharded_backend"]
        except FileNotFoundError:
            raise UserError(
                f"init: {self._folder} has no {DESCRIBED}, which megatron-core writes last: the save did "
                "not end; give an earlier checkpoint"
            ) from None
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise damaged(self._folder, f"{DESCRIBED}: {first_line(error)}") from None
        if backend != "torch_dist":
            raise UserError(
                f"init: {self._folder} is of the format {backend}, and torch_dist alone is read; save it "
                "with --ckpt-format torch_dist"
            )

    def _check_sizes(self) -> None:
        """Raises UserError where a file ends before what is said to lie in it."""
        ends: dict[str, int] = {}
        for place in self._places.values():
            name = place.relative_path
            ends[name] = max(ends.get(name, 0), place.offset + place.length)
        for name, end in ends.items():
            try:
                size = (self._folder / name).stat().st_size
            except OSError as error:
                raise damaged(self._folder, f"{name}: {error.strerror}") from None
            if Path(name).name != name or size < end:
                raise damaged(self._folder, f"{name}: {size} bytes in place of {end}")

    def _compare(self, given: dict[str, Any]) -> None:
        """Raises UserError with every key of the model section that would have to be another."""
        model = self._model
        ours = vars(model) | {
            "num_query_groups": model.num_query_groups or model.num_attention_heads,
            "kv_channels": model.kv_channels or model.hidden_size // model.num_attention_heads,
        }
        wanted = {k: v for k, v in section_of(given).items() if v != ours[k]}
        stored = self._tensors.get(VOCABULARY[0])
        if stored is not None:
            padding = given.get("make_vocab_size_divisible_by") or 128
            padding *= given.get("tensor_model_parallel_size") or 8
            if not 0 <= stored.size[0] - model.vocab_size < padding:
                wanted["vocab_size"] = stored.size[0]
        if wanted:
            raise another_model(self._folder, wanted)
        expected, found = stored_names(model), {_without_block(name) for name in self._tensors}
        for names, what in ((expected - found, "lacks"), (found - expected, "also holds")):
            if names:
                raise UserError(
                    f"init: {self._folder} {what} {sorted(names)[0]}, so it is another model than the "
                    "run's; change the model section, or give another folder"
                )


def _without_block(name: str) -> str:
    """The name that all blocks share, of a whole SwiGLU projection."""
    if not name.startswith(LAYERS):
        return name
    number, _, end = name.removeprefix(LAYERS).partition(".")
    if not number.isdigit():
        return name
    return LAYERS + end.removesuffix("_w").removesuffix("_v")


def _newest(folder: Path) -> Path:
    """The checkpoint's own folder, of Megatron-LM's folder of checkpoints the one that its file names."""
    tracker = folder / TRACKER
    if not tracker.is_file():
        return folder
    try:
        told = tracker.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise UserError(f"init: {tracker} cannot be read ({first_line(error)})") from None
    found = folder / ("release" if told == "release" else f"iter_{told:0>7}")
    if not told.isalnum() or not found.is_dir():
        raise UserError(
            f"init: {tracker} names {found.name}, which is not there; give the folder of a checkpoint"
        )
    return found


class _Shell(dict):
    """Stands for an object of a class that is not known here: it takes anything and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Shell:
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, _: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        pass

    def extend(self, _: Any) -> None:
        pass


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _CLASSES.get(module, ()):
            return super().find_class(module, name)
        return _Shell


def _read_places(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            found = _Reader(file).load()
        assert isinstance(found.state_dict_metadata, dict) and isinstance(found.storage_data, dict)
    except Exception as error:  # an unpickler raises what it likes
        raise damaged(path, first_line(error)) from None
    return found
