"""``fp4pretrain export``: a trained model is used."""

from __future__ import annotations

import argparse
from typing import Any

from fp4pretrain.cli.parser import add_verb, path

EXPORT_HELP = """\
Write a run's newest checkpoint, of any layout, as a Hugging Face folder: config.json, safetensors and the
tokenizer, which transformers and vLLM load. The architecture follows from the model section: Llama, Qwen3
(model.qk_norm), Arcee (an MLP without a gate) or GPT-2.

  fp4pretrain export runs/nvfp4-seed1234 --to hf --out exported
  fp4pretrain export runs/a/checkpoints/step_00000100 --to hf --out exported --dtype fp32
  fp4pretrain export runs/nvfp4-seed1234 --to hf --out exported --quantize   linears in the recipe's FP4
"""


def add(verbs: Any) -> None:
    export = add_verb(verbs, "export", "a run's model for Hugging Face", EXPORT_HELP, _export)
    export.add_argument("run", type=path, metavar="RUN", help="a run's folder, or a checkpoint's")
    export.add_argument("--to", choices=("hf",), default="hf", help="the layout (default: hf)")
    export.add_argument("--out", type=path, required=True, metavar="DIR", help="a new folder")
    export.add_argument(
        "--dtype",
        choices=("bf16", "fp32"),
        help="fp32: master weights (default: as the run's GEMMs)",
    )
    export.add_argument(
        "--quantize",
        action="store_true",
        help="linears that the recipe's forward pass has in FP4, in compressed-tensors' layout",
    )
    export.add_argument("--tokenizer", help="in place of the run's data.tokenizer")


def _export(arguments: argparse.Namespace) -> None:
    from fp4pretrain.ops.choice import without_triton

    without_triton()  # before megatron-core looks for it
    from fp4pretrain.convert import Export, export_hf
    from fp4pretrain.train.stored import stored_run

    wanted = Export(arguments.dtype, arguments.quantize, arguments.tokenizer)
    made = export_hf(stored_run(arguments.run), arguments.out, wanted)
    kind = made["quantized"] or made["dtype"]
    print(f"{arguments.out}: {made['architecture']}, {kind}, step {made['step']} of {made['run']}")
