"""A checkpoint as megatron-core's own: what its dist_checkpointing and Megatron-LM's ``--load`` read.

    OUT/latest_checkpointed_iteration.txt   "release": Megatron-LM starts at iteration 0 with these weights
    OUT/release/metadata.json               the format, torch_dist; written last
    OUT/release/.metadata, __0_0.distcp     the weights, each block's a box of one tensor
    OUT/release/common.pt                   Megatron-LM's arguments of the model
    OUT/fp4pretrain.json                    the run, its step, recipe and fingerprint

Weights alone: optimizer and generators begin anew. Every layout reads it, and one block's tensor at a time
is in memory.
"""

from __future__ import annotations

import io
import json
import warnings
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    BytesIOWriteData,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from fp4pretrain.convert.export import DTYPES, Export, facts_of, write_json
from fp4pretrain.convert.weights import CheckpointWeights
from fp4pretrain.errors import UserError
from fp4pretrain.files import new_folder, write_text
from fp4pretrain.model.megatron_names import LAYERS, OBJECTS, VOCABULARY, arguments, stored_name
from fp4pretrain.train.stored import StoredRun


@dataclass(frozen=True)
class Box:
    """The part of the tensor ``name`` [shape] that begins at ``offset``: ``read`` when it is written."""

    name: str
    shape: tuple[int, ...]
    offset: tuple[int, ...]
    part: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]


def export_megatron(run: StoredRun, out: Path, wanted: Export | None = None) -> dict[str, Any]:
    """Write ``run``'s checkpoint to the new folder ``out``; returns what fp4pretrain.json says.

    Raises UserError for a model that megatron-core does not compute, an option that its checkpoints have
    no place for, a damaged checkpoint, or an ``out`` that exists or cannot be written. Then nothing is
    left behind.
    """
    wanted = wanted or Export()
    for option, asked in (("--quantize", wanted.quantize), ("--tokenizer", wanted.tokenizer)):
        if asked:
            raise UserError(
                f"{option}: a megatron-core checkpoint holds no such thing; leave it out"
            )
    model = run.config.model
    dtype = wanted.dtype or run.config.optim.params_dtype
    weights = CheckpointWeights(run.checkpoint, masters=dtype == "fp32")
    given = arguments(model, padded_vocab=weights.shapes()[VOCABULARY[0]][0])
    common = {
        "args": Namespace(
            **given,
            bf16=dtype == "bf16",
            tensor_model_parallel_size=1,
            pipeline_model_parallel_size=1,
            ckpt_format="torch_dist",
            no_save_optim=True,
            no_save_rng=True,
        ),
        "checkpoint_version": 3.0,
        "iteration": run.step,
        "content_metadata": {"singleton_local_shards": False},
    }
    facts = facts_of(run, "megatron-core", dtype)
    with new_folder(out, key="--out") as beside:
        folder = beside / "release"
        folder.mkdir()
        planner = _Planner(_boxes(weights, DTYPES[dtype]), _objects(model.num_layers))
        writer = dcp.FileSystemWriter(folder, per_thread_copy_ahead=0)
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "torch.distributed is "
            )  # one process writes: so it is
            dcp.save({}, storage_writer=writer, planner=planner, no_dist=True)
        torch.save(common, folder / "common.pt")
        described = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        described |= {"common_backend": "torch", "common_backend_version": 1}
        write_text(folder / "metadata.json", json.dumps(described))
        write_text(beside / "latest_checkpointed_iteration.txt", "release")
        write_json(beside / "fp4pretrain.json", facts)
    return facts


def _boxes(weights: CheckpointWeights, dtype: torch.dtype) -> Iterator[Box]:
    """Tensors outside the blocks, and of those inside each block's part."""
    for key, shape in weights.shapes().items():
        if not key.startswith(LAYERS):
            read = partial(weights.whole, key)
            yield Box(key, shape, (0,) * len(shape), shape, dtype, read)
            continue
        ours = key.removeprefix(LAYERS)
        for layer in range(shape[0]):
            read = partial(weights.of_layer, ours, layer)
            offset, part = (layer, *(0,) * len(shape[1:])), (1, *shape[1:])
            yield Box(LAYERS + stored_name(ours), shape, offset, part, dtype, read)


def _objects(num_layers: int) -> Iterator[str]:
    """Names of what modules store beside tensors: nothing, but megatron-core asks for it."""
    for layer in range(num_layers):
        for module in OBJECTS:
            yield f"{LAYERS}{module}._extra_state/shard_{layer}_{num_layers}"
    yield "decoder.final_layernorm._extra_state/shard_0_1"


class _Planner(dcp.DefaultSavePlanner):
    """Tells torch's writer what to write, and reads each tensor when it is its turn."""

    def __init__(self, boxes: Iterable[Box], objects: Iterable[str]) -> None:
        super().__init__(flatten_state_dict=False)
        self._items = [
            WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO, BytesIOWriteData(0))
            for name in objects
        ]
        self._boxes: dict[MetadataIndex, Box] = {}
        for box in boxes:
            index = MetadataIndex(box.name, torch.Size(box.offset))
            chunk = ChunkStorageMetadata(torch.Size(box.offset), torch.Size(box.part))
            data = TensorWriteData(chunk, TensorProperties(dtype=box.dtype), torch.Size(box.shape))
            self._items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
            self._boxes[index] = box

    def create_local_plan(self) -> SavePlan:
        self.plan = SavePlan(self._items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            raw = io.BytesIO()
            torch.save([None], raw)
            return raw
        box = self._boxes[write_item.index]
        return box.read().to(box.dtype).view(box.part)
