"""``fp4pretrain export``, ``generate`` and ``eval``: a trained model is used."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator
from typing import Any

from fp4pretrain.cli.parser import add_verb, path
from fp4pretrain.errors import UserError

EXPORT_HELP = """\
Write a run's newest checkpoint, of any layout, as a Hugging Face folder: config.json, safetensors and the
tokenizer, which transformers and vLLM load. The architecture follows from the model section: Llama, Qwen3
(model.qk_norm), Arcee (an MLP without a gate) or GPT-2. Or, with --to megatron, as a checkpoint of
megatron-core (torch_dist), which Megatron-LM loads with --load DIR --use-checkpoint-args.

  fp4pretrain export runs/nvfp4-seed1234 --to hf --out exported
  fp4pretrain export runs/a/checkpoints/step_00000100 --to hf --out exported --dtype fp32
  fp4pretrain export runs/nvfp4-seed1234 --to hf --out exported --quantize   linears in the recipe's FP4
  fp4pretrain export runs/nvfp4-seed1234 --out exported --quantize --layout modelopt --calibrate held-out.txt
  fp4pretrain export runs/nvfp4-seed1234 --to megatron --out exported
"""

GENERATE_HELP = """\
Let a run's newest checkpoint, of any layout, continue a prompt, on one process. Prints the continuation
alone, or with --json the prompt too. Linears are in BF16, or with --precision recipe as they were trained.

  fp4pretrain generate runs/nvfp4-seed1234 --prompt "def main(" --seed 1
  fp4pretrain generate runs/nvfp4-seed1234 --prompt "import " --temperature 0 --max-tokens 40
  fp4pretrain generate runs/nvfp4-seed1234 --prompt "class " --samples 4 --top-p 0.9 --json
"""

EVAL_HELP = """\
Evaluate a run's newest checkpoint, of any layout, on one process: its loss, perplexity and bits a byte on
text, or the tasks of lm-eval (pip install 'fp4pretrain[eval]'), also those of YAML files of your own. The
results are printed, added to the run's metrics.jsonl as eval/NAME and to the summary of its wandb run.

  fp4pretrain eval runs/nvfp4-seed1234 --text held-out.txt more.jsonl.zst
  fp4pretrain eval runs/nvfp4-seed1234 --tasks lambada_openai,piqa --limit 100
  fp4pretrain eval runs/nvfp4-seed1234 --tasks mine --task-folder tasks/ --precision recipe --json
"""


def add(verbs: Any) -> None:
    """Add this module's verbs to ``fp4pretrain``."""
    export = add_verb(verbs, "export", "a run's model for other programs", EXPORT_HELP, _export)
    export.add_argument("run", type=path, metavar="RUN", help="a run's folder, or a checkpoint's")
    export.add_argument(
        "--to", choices=("hf", "megatron"), default="hf", help="the layout (default: hf)"
    )
    export.add_argument("--out", type=path, required=True, metavar="DIR", help="a new folder")
    export.add_argument(
        "--dtype",
        choices=("bf16", "fp32"),
        help="fp32: master weights (default: as the run's GEMMs)",
    )
    export.add_argument(
        "--quantize",
        action="store_true",
        help="store linears in FP4 that the recipe's forward pass has in FP4",
    )
    export.add_argument(
        "--layout",
        choices=("compressed-tensors", "modelopt"),
        help="of --quantize (default: compressed-tensors)",
    )
    export.add_argument(
        "--calibrate",
        nargs="+",
        metavar="FILE",
        help="text that is run through the model, for modelopt's scales of activations",
    )
    export.add_argument("--tokenizer", help="in place of the run's data.tokenizer")

    generate = add_verb(verbs, "generate", "let a model write", GENERATE_HELP, _generate)
    _loading(generate)
    generate.add_argument("--prompt", required=True, help="'' begins a document")
    generate.add_argument("--max-tokens", type=int, default=128, metavar="N")
    generate.add_argument("--temperature", type=float, default=1.0, help="0: the likeliest token")
    generate.add_argument("--top-k", type=int, default=0, metavar="K", help="0: of all tokens")
    generate.add_argument("--top-p", type=float, default=1.0, metavar="P")
    generate.add_argument("--samples", type=int, default=1, metavar="N")
    generate.add_argument("--seed", type=int, default=1234)
    generate.add_argument("--json", action="store_true", help="print JSON and nothing else")

    evaluate = add_verb(verbs, "eval", "a model on text or tasks", EVAL_HELP, _eval)
    _loading(evaluate)
    evaluate.add_argument("--text", nargs="+", metavar="FILE", help="inputs as of data build")
    evaluate.add_argument("--text-key", default="text", metavar="KEY", help="of JSON objects")
    evaluate.add_argument("--tasks", metavar="NAME,...", help="of lm-eval")
    evaluate.add_argument("--task-folder", type=path, metavar="DIR", help="of YAML files of tasks")
    evaluate.add_argument("--shots", type=int, metavar="N", help="solved examples before each")
    evaluate.add_argument("--limit", type=int, metavar="N", help="documents of each task")
    evaluate.add_argument("--no-record", action="store_true", help="leave the run's files alone")
    evaluate.add_argument("--json", action="store_true", help="print JSON and nothing else")


def _loading(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("run", type=path, metavar="RUN", help="a run's folder, or a checkpoint's")
    verb.add_argument("--precision", choices=("bf16", "recipe"), default="bf16")
    verb.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    verb.add_argument("--tokenizer", help="in place of the run's data.tokenizer")


def _export(arguments: argparse.Namespace) -> None:
    from fp4pretrain.ops.choice import without_triton

    without_triton()  # before megatron-core looks for it
    from fp4pretrain.convert import LAYOUTS, Export, export_hf, export_megatron
    from fp4pretrain.train.stored import stored_run

    wanted = Export(
        arguments.dtype,
        arguments.quantize,
        arguments.layout or LAYOUTS[0],
        _inputs(arguments),
        arguments.tokenizer,
    )
    export = {"hf": export_hf, "megatron": export_megatron}[arguments.to]
    made = export(stored_run(arguments.run), arguments.out, wanted)
    kind = made["quantized"] or made["dtype"]
    print(f"{arguments.out}: {made['architecture']}, {kind}, step {made['step']} of {made['run']}")


def _inputs(arguments: argparse.Namespace) -> dict[tuple[int, str], float] | None:
    """What ``--calibrate`` finds. Raises UserError for options that do not go together."""
    for option in ("layout", "calibrate"):
        if getattr(arguments, option) and not arguments.quantize:
            raise UserError(
                f"--{option}: it is about linears in FP4; add --quantize, or leave it out"
            )
    if not arguments.calibrate:
        return None
    if arguments.layout != "modelopt":
        raise UserError(
            "--calibrate: compressed-tensors has activations in BF16; use --layout modelopt"
        )
    from fp4pretrain.data import Reading
    from fp4pretrain.data.text import list_files, read_documents
    from fp4pretrain.infer import largest_inputs

    texts = read_documents(list_files(arguments.calibrate), Reading("text"))
    arguments.precision, arguments.device = "recipe", "auto"
    with _model(arguments) as model:
        return largest_inputs(model, texts)


@contextlib.contextmanager
def _model(arguments: argparse.Namespace) -> Iterator[Any]:
    """The model that the arguments name; what libraries say meanwhile goes to stderr."""
    from fp4pretrain.ops.choice import without_triton

    without_triton()
    from fp4pretrain.infer import load_model
    from fp4pretrain.parallel import groups
    from fp4pretrain.train.stored import stored_run

    if groups.world_size() > 1:
        raise UserError("torchrun: this verb runs on one process; start it without torchrun")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield load_model(
                stored_run(arguments.run),
                precision=arguments.precision,
                device=arguments.device,
                tokenizer=arguments.tokenizer,
            )
    finally:
        groups.leave(destroy=True)


def _generate(arguments: argparse.Namespace) -> None:
    from fp4pretrain.infer import Sampling, generate

    if arguments.samples < 1:
        raise UserError(f"--samples: {arguments.samples} is out of range; give 1 or more")
    a = arguments
    how = Sampling(a.max_tokens, a.temperature, a.top_k, a.top_p, a.seed)
    with _model(arguments) as model:
        texts = generate(model, arguments.prompt, how, samples=arguments.samples)
    if arguments.json:
        print(json.dumps({"prompt": arguments.prompt, "texts": texts}, indent=1))
    else:
        print("\n---\n".join(texts))


def _eval(arguments: argparse.Namespace) -> None:
    from fp4pretrain.infer import record, text_loss
    from fp4pretrain.infer.harness import run_tasks

    if not arguments.text and not arguments.tasks:
        raise UserError("--text: nothing is to be evaluated; give --text FILE or --tasks NAME")
    found: dict[str, float] = {}
    with _model(arguments) as model:
        if arguments.text:
            from fp4pretrain.data import Reading
            from fp4pretrain.data.text import list_files, read_documents

            texts = read_documents(list_files(arguments.text), Reading(arguments.text_key))
            found |= {f"text/{k}": v for k, v in text_loss(model, texts).values().items()}
        if arguments.tasks:
            found |= run_tasks(
                model,
                [name for name in arguments.tasks.split(",") if name],
                folder=arguments.task_folder,
                shots=arguments.shots,
                limit=arguments.limit,
            )
        if not arguments.no_record:
            record(model.run, found)
        step = model.run.step
    if arguments.json:
        print(json.dumps({"run": str(arguments.run), "step": step, "results": found}, indent=1))
        return
    width = max(map(len, found), default=0)
    for name, value in found.items():
        print(f"{name:{width}}  {value:.4f}")
