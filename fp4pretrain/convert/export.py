"""A checkpoint as a Hugging Face folder: written beside its place, then renamed.

config.json             the architecture and its sizes; quantization_config where weights are FP4
hf_quant_config.json    the same for those who read ModelOpt's layout
model.safetensors       or model-0000N-of-0000M.safetensors and their index, 4 GiB each
tokenizer.json, ...     the run's tokenizer
generation_config.json  which token ends a text
fp4pretrain.json        the run, its step, recipe and fingerprint
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fp4pretrain import __version__
from fp4pretrain.config import plan_of
from fp4pretrain.convert.packed import LAYOUTS, Inputs, Packer
from fp4pretrain.convert.tensors import tensors_of
from fp4pretrain.convert.tokenizer import exportable, fitting_tokenizer, write_tokenizer
from fp4pretrain.convert.weights import CheckpointWeights
from fp4pretrain.files import new_folder, write_text
from fp4pretrain.model.families import family_of
from fp4pretrain.train.stored import StoredRun

_FILE_BYTES = 4 << 30
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Export:
    """What is written.

    ``dtype``: fp32 (the masters) or bf16; None is what the run's GEMMs read. ``quantize``: linears
    that the recipe's forward pass has in FP4 are stored in FP4, by ``layout`` of ``packed.LAYOUTS``;
    ``inputs``: for scales of activations in it. ``tokenizer``: None is the run's.
    """

    dtype: str | None = None
    quantize: bool = False
    layout: str = LAYOUTS[0]
    inputs: Inputs | None = None
    tokenizer: str | None = None


def export_hf(run: StoredRun, out: Path, wanted: Export | None = None) -> dict[str, Any]:
    """Write ``run``'s checkpoint to the new folder ``out``; returns what fp4pretrain.json says.

    Raises UserError for a model that no architecture is, a tokenizer that does not fit, a damaged
    checkpoint, or an ``out`` that exists or cannot be written. Then nothing is left behind.
    """
    wanted = wanted or Export()
    config = run.config
    family = family_of(config.model)
    named = wanted.tokenizer or config.data.tokenizer
    tokenizer = exportable(fitting_tokenizer(named, vocab_size=config.model.vocab_size))
    dtype = wanted.dtype or config.optim.params_dtype
    packer = None
    if wanted.quantize:
        packer = Packer(
            plan_of(config),
            run.last_moment,
            family,
            layout=wanted.layout,
            inputs=wanted.inputs,
        )
    # casts are made of what the GEMMs read, the master weights only where those are asked for
    weights = CheckpointWeights(run.checkpoint, masters=dtype == "fp32" and packer is None)
    facts = facts_of(run, family.architecture, dtype, quantized=packer.layout if packer else None)
    described = family.config | {
        "torch_dtype": {"fp32": "float32", "bf16": "bfloat16"}[dtype],
        "bos_token_id": None,
        "eos_token_id": tokenizer.eod,
    }
    if packer is not None:
        described["quantization_config"] = packer.config()
    tensors = _in(DTYPES[dtype], tensors_of(family, config.model, weights, packer))
    with new_folder(out, key="--out") as beside:
        _write_tensors(tensors, beside)
        write_json(beside / "config.json", described)
        for name, content in (packer.files() if packer else {}).items():
            write_json(beside / name, content)
        ends = {"bos_token_id": None, "eos_token_id": tokenizer.eod}
        write_json(beside / "generation_config.json", ends)
        write_json(beside / "fp4pretrain.json", facts)
        write_tokenizer(tokenizer, beside)
    return facts


def _in(
    dtype: torch.dtype, tensors: Iterator[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors with weights and biases in ``dtype``; codes and scales of FP4 stay as they are."""
    for name, tensor in tensors:
        plain = name.endswith((".weight", ".bias")) and tensor.dtype != torch.uint8
        yield name, tensor.to(dtype) if plain else tensor


def facts_of(
    run: StoredRun, architecture: str, dtype: str, *, quantized: str | None = None
) -> dict[str, Any]:
    """Where an exported folder comes from: its fp4pretrain.json."""
    return {
        "architecture": architecture,
        "dtype": dtype,
        "quantized": quantized,
        "run": run.folder.name,
        "step": run.step,
        "recipe": run.config.precision.name,
        "fingerprint": run.fingerprint,
        "fp4pretrain": __version__,
    }


def _write_tensors(tensors: Iterator[tuple[str, torch.Tensor]], folder: Path) -> None:
    """Write one file, or several of about ``_FILE_BYTES`` with an index. No more than one file's tensors
    are in memory."""
    from safetensors.torch import save_file

    names: list[list[str]] = []
    waiting: dict[str, torch.Tensor] = {}
    total = 0

    def flush() -> None:
        save_file(waiting, folder / f"part-{len(names)}", metadata={"format": "pt"})
        (folder / f"part-{len(names)}").chmod(0o644)
        names.append(list(waiting))
        waiting.clear()

    for name, tensor in tensors:
        if waiting and sum(t.nbytes for t in waiting.values()) + tensor.nbytes > _FILE_BYTES:
            flush()
        waiting[name] = tensor
        total += tensor.nbytes
    flush()
    if len(names) == 1:
        (folder / "part-0").rename(folder / "model.safetensors")
        return
    files = [f"model-{i:05d}-of-{len(names):05d}.safetensors" for i in range(1, len(names) + 1)]
    for number, file in enumerate(files):
        (folder / f"part-{number}").rename(folder / file)
    places = {name: file for file, held in zip(files, names, strict=True) for name in held}
    index = {"metadata": {"total_size": total}, "weight_map": places}
    write_json(folder / "model.safetensors.index.json", index)


def write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=2) + "\n")
