"""The command line: ``fp4pretrain VERB``. Parsing and printing only; the work is in the rooms.

A mistake of the user's (UserError) is one line on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from fp4pretrain import culprit_verb, doctor_verb
from fp4pretrain.console import plain_console
from fp4pretrain.errors import UserError
from fp4pretrain.files import user_path, write_text
from fp4pretrain.parallel.launch import is_main
from fp4pretrain.presets import groups

TRAIN_HELP = """\
Train a GPT. Keys are set as key=value (Hydra's grammar); groups pick a YAML file.

  fp4pretrain train precision=nvfp4                      one run, into runs/nvfp4-seed1234
  fp4pretrain train precision=nvfp4 baseline=fp8         first FP8, then NVFP4, then their gap
  fp4pretrain train -m precision=bf16,fp8,nvfp4          a sweep: one run after the other
  fp4pretrain train run_dir=runs/a resume=auto           continue (or start) runs/a
  torchrun --nproc-per-node 4 -m fp4pretrain train parallel.tensor=2 parallel.pipeline=2

Groups and their options:
{groups}
Every key with its value: fp4pretrain train --cfg. Keys used most: train.steps, train.micro_batch,
train.global_batch, optim.lr, parallel.tensor, parallel.pipeline, parallel.sequence, data.path, seed,
run_dir, resume, logging.wandb.mode, precision.wgrad.rotation.kind, precision.keep.last_blocks.
"""

COMPARE_HELP = """\
The loss gap of runs to a baseline (the first run, or --baseline) at matched tokens: a table, a PNG
and with --html one self-contained page. Refuses runs that differ in more than the recipe; those that
differ in their seeds alone are one row. Pairs of runs of one seed give its gap a 90% interval and a
verdict: behind, ahead or undecided. Where a recipe has runs of several optim.lr, its best is compared.

  fp4pretrain compare runs/demo-fp8 runs/demo-nvfp4 --out runs/demo.png
  fp4pretrain compare runs/fp8-seed* runs/nvfp4-seed*
  fp4pretrain compare runs/* --baseline runs/bf16-seed1 --json
  fp4pretrain compare runs/* --watch                            the page, live, while runs go on
"""

NOISE_HELP = """\
What chance alone does to a loss: trains replicates of one config that differ in nothing but the order
of sums, then in the order of data, then in initial weights; prints the standard deviations and which
gap n pairs of runs can see. A second call goes on where the first was stopped.

  fp4pretrain noise precision=bf16 model=gpt_10m data.path=data/corpus --out runs/noise
  fp4pretrain compare runs/* --noise runs/noise/noise.json
"""

DATA_HELP = """\
Build and look at datasets: Megatron indexed datasets (PREFIX.bin, PREFIX.idx).

  fp4pretrain data build notes/ more.jsonl --out data/notes             bytes
  fp4pretrain data build web.jsonl.zst --text-key content --out data/web
  fp4pretrain data train-bpe notes/ --vocab-size 8192 --out bpe.json    a tokenizer of your own
  fp4pretrain data build notes/ --out data/notes --tokenizer bpe.json
  fp4pretrain data inspect data/notes
  fp4pretrain data corpus --out data/text                               text that this machine has
  fp4pretrain data corpus torch notes/ linux-doc --out data/text        packages, folders, Debian packages

Inputs: text, .jsonl and .ndjson (an object a line), .json (the same, or one array), each also as .gz or
.zst, folders of them, and stdlib (this Python's standard library).
"""


BENCH_HELP = """\
Time kernels beside a device copy, or linears beside BF16, on this machine's GPU: a table and JSON.

  fp4pretrain bench kernels --out runs/bench
  fp4pretrain bench linear --precision nvfp4,mxfp4_h16,fp8
  fp4pretrain bench linear --precision fp8 precision.fprop.fast_accum=false     keys of every recipe
"""


# What a file system refuses, wherever it does -> the cure.
_REFUSED = {
    errno.EACCES: "change its permissions, or name another place",
    errno.EPERM: "change its permissions, or name another place",
    errno.EROFS: "name a place that can be written",
    errno.ENOSPC: "make room, or name a place that has some",
    errno.EDQUOT: "make room, or name a place that has some",
    errno.ENAMETOOLONG: "give a shorter name",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run one verb; exits with 0, or 2 after one line about the user's mistake."""
    _quiet_libraries()
    plain_console(sys.stdout, sys.stderr)
    try:
        arguments, rest = _parser().parse_known_args(argv)
        _take_rest(arguments, rest)
        arguments.work(arguments)
    except UserError as error:
        shown = is_main() if error.shown is None else error.shown
        if shown:
            print(f"fp4pretrain: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in _REFUSED or error.filename is None:
            raise
        print(
            f"fp4pretrain: {error.filename}: {error.strerror}; {_REFUSED[error.errno]}",
            file=sys.stderr,
        )
        sys.exit(2)
    except KeyboardInterrupt:
        print("fp4pretrain: interrupted", file=sys.stderr)
        sys.exit(130)


class _Parser(argparse.ArgumentParser):
    """argparse, with its complaints as one line like any other."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def _path(text: str) -> Path:
    """A path of the command line; ``--out=~/x`` reaches us as it is, no shell reads a ~ there."""
    return user_path(text, key="path")


def _take_rest(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Overrides after an option (``train a=1 -m b=2``), which argparse leaves over."""
    for text in rest:
        if text.startswith("-") or not hasattr(arguments, "overrides"):
            raise UserError(
                f"{text}: no such option; keys are set as key=value, options are in --help"
            )
        arguments.overrides.append(text)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fp4pretrain",
        description="Pretrain GPT models in 4-bit floating point on megatron-core.",
        epilog="fp4pretrain VERB --help explains each verb.",
    )
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    def verb(name: str, summary: str, text: str, work: Callable) -> argparse.ArgumentParser:
        added = verbs.add_parser(
            name,
            help=summary,
            description=text,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(work=work)
        return added

    train = verb(
        "train", "train a model, a sweep, or a recipe with a baseline", _train_help(), _train
    )
    train.add_argument("overrides", nargs="*", metavar="key=value")
    train.add_argument("-m", "--multirun", action="store_true", help="sweep over a=1,2 values")
    train.add_argument("--cfg", action="store_true", help="print the composed config and stop")

    compare = verb("compare", "the loss gap between finished runs", COMPARE_HELP, _compare)
    compare.add_argument("runs", nargs="+", type=_path, metavar="RUN_DIR")
    compare.add_argument("--baseline", type=_path, metavar="RUN_DIR")
    compare.add_argument("--out", type=_path, default=Path("runs"), metavar="PNG or DIR")
    compare.add_argument("--html", action="store_true", help="write a page beside the picture")
    compare.add_argument(
        "--watch", action="store_true", help="serve the page on this machine while the runs go on"
    )
    compare.add_argument("--port", type=int, default=8008, help="of --watch (0: any)")
    compare.add_argument("--force", action="store_true", help="compare unequal runs too")
    compare.add_argument(
        "--noise", type=Path, metavar="JSON", help="of one run, for the interval of a single pair"
    )
    compare.add_argument("--json", action="store_true", help="print JSON and nothing else")

    noise = verb("noise", "what chance alone does to a loss", NOISE_HELP, _noise)
    noise.add_argument("overrides", nargs="*", metavar="key=value")
    noise.add_argument("--replicates", type=int, default=3, metavar="N", help="of each kind")
    noise.add_argument("--out", type=Path, default=Path("runs/noise"), metavar="DIR")
    noise.add_argument("--json", action="store_true", help="print JSON and nothing else")

    culprit = verb(
        "culprit",
        "which casts of a trained model cost the most",
        culprit_verb.HELP,
        culprit_verb.work,
    )
    culprit_verb.add_options(culprit)

    data = verb("data", "build, inspect and tokenize datasets", DATA_HELP, _data)
    _data_jobs(data)

    bench = verb("bench", "time kernels or linears on this GPU", BENCH_HELP, _bench)
    bench.add_argument("what", choices=("kernels", "linear"))
    bench.add_argument("overrides", nargs="*", metavar="key=value")
    bench.add_argument("--precision", default="nvfp4,mxfp4_h16,fp8", metavar="RECIPE,...")
    bench.add_argument("--out", type=_path, default=Path("runs/bench"), metavar="DIR")

    doctor = verb(
        "doctor", "what this machine can run, and why not", doctor_verb.HELP, doctor_verb.work
    )
    doctor_verb.add_options(doctor)
    return parser


def _data_jobs(data: argparse.ArgumentParser) -> None:
    jobs = data.add_subparsers(title="jobs", required=True, metavar="JOB", dest="job")
    build = jobs.add_parser("build", help="text or JSON files to an indexed dataset")
    build.add_argument("--out", required=True, metavar="PREFIX")
    build.add_argument("--tokenizer", default="byte", help="byte, a tokenizer.json, or a HF folder")
    build.add_argument("--force", action="store_true", help="replace a dataset that is there")
    bpe = jobs.add_parser("train-bpe", help="train a byte-level BPE tokenizer")
    for job in (build, bpe):
        job.add_argument("inputs", nargs="+", metavar="FILE or DIR or stdlib")
        job.add_argument("--text-key", default="text", metavar="KEY", help="of JSON objects")
        job.add_argument(
            "--on-error", choices=("stop", "skip"), default="stop", help="at a broken record"
        )
    bpe.add_argument("--vocab-size", type=int, required=True)
    bpe.add_argument("--out", required=True, metavar="tokenizer.json")
    inspect = jobs.add_parser("inspect", help="what is in an indexed dataset")
    inspect.add_argument("prefix", metavar="PREFIX")
    inspect.add_argument("--tokenizer", help="to show the text; default: the one it was built with")
    corpus = jobs.add_parser("corpus", help="a dataset and its BPE of text that this machine has")
    corpus.add_argument(
        "sources",
        nargs="*",
        metavar="SOURCE",
        help="packages, stdlib, system (these three if none is given), a folder, a file, an "
        "importable or a Debian package",
    )
    corpus.add_argument("--out", required=True, metavar="PREFIX")
    corpus.add_argument("--vocab-size", type=int, default=8192)
    corpus.add_argument("--workers", type=int, help="processes (default: one a core)")
    corpus.add_argument("--force", action="store_true", help="replace an existing dataset")


def _train_help() -> str:
    offered = groups()
    width = max(map(len, offered))
    lines = "".join(f"  {g:{width}}  {' '.join(o)}\n" for g, o in offered.items() if o)
    return TRAIN_HELP.format(groups=lines)


def _train(arguments: argparse.Namespace) -> None:
    from fp4pretrain.overrides import expand_sweep

    sweep = expand_sweep(arguments.overrides) if arguments.multirun else [arguments.overrides]
    if arguments.cfg:
        from omegaconf import OmegaConf

        from fp4pretrain.config import compose

        configs = [OmegaConf.to_yaml(OmegaConf.structured(compose(one))) for one in sweep]
        print("---\n".join(configs), end="")
        return

    from fp4pretrain.ops.choice import without_triton

    without_triton()  # before megatron-core looks for it
    from fp4pretrain.parallel.groups import leave
    from fp4pretrain.train.beside import train_all

    try:
        train_all(sweep)
    finally:
        leave(destroy=True)


def _compare(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from fp4pretrain.report import Comparison, Options, as_json, compare, read_noise, table

    options = Options(
        force=arguments.force,
        html=arguments.html,
        noise=None if arguments.noise is None else read_noise(arguments.noise),
    )

    def compared() -> Comparison:
        return compare(
            arguments.runs, out=arguments.out, baseline=arguments.baseline, options=options
        )

    if arguments.watch:
        from fp4pretrain.report.watch import Watched, watch

        folders = [*arguments.runs, *([arguments.baseline] if arguments.baseline else [])]
        watch(Watched(folders, compared), port=arguments.port, say=lambda t: print(t, flush=True))
        return
    comparison = compared()
    if arguments.json:
        print(json.dumps(as_json(comparison), indent=1, allow_nan=False))
        return
    console = Console(highlight=False)
    console.print(table(comparison))
    for path in (comparison.picture, comparison.page):
        if path is not None:
            console.print(str(path))


def _noise(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from fp4pretrain.parallel.groups import leave
    from fp4pretrain.report import measure_noise, noise_table
    from fp4pretrain.train.replicates import train_replicates

    # what training says is for the reader, not for a program
    told = contextlib.redirect_stdout(sys.stderr) if arguments.json else contextlib.nullcontext()
    try:
        with told:
            paths = train_replicates(
                arguments.overrides, replicates=arguments.replicates, out=arguments.out
            )
    finally:
        leave(destroy=True)
    if not is_main():
        return
    found = measure_noise(paths)
    text = json.dumps(found, indent=1, allow_nan=False)
    path = arguments.out / "noise.json"
    write_text(path, text + "\n")
    if arguments.json:
        print(text)
        return
    console = Console(highlight=False)
    console.print(noise_table(found))
    console.print(str(path))


def _data(arguments: argparse.Namespace) -> None:
    from fp4pretrain import data

    if arguments.job == "inspect":
        data.inspect(arguments.prefix, tokenizer=arguments.tokenizer)
        return
    if arguments.job == "corpus":
        _corpus(arguments)
        return
    reading = data.Reading(arguments.text_key, skip=arguments.on_error == "skip")
    if arguments.job == "build":
        data.prepare_text(
            arguments.inputs,
            arguments.out,
            arguments.tokenizer,
            reading=reading,
            force=arguments.force,
        )
        data.inspect(arguments.out)
    else:
        print(
            data.train_bpe(arguments.inputs, arguments.vocab_size, arguments.out, reading=reading)
        )
    if reading.skipped:
        first = reading.first_skipped
        print(f"warning: {reading.skipped} broken records passed over, the first: {first}")


def _corpus(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from fp4pretrain.data.corpus import DEFAULT_SOURCES, build_corpus

    made = build_corpus(
        arguments.out,
        arguments.sources or DEFAULT_SOURCES,
        vocab_size=arguments.vocab_size,
        workers=arguments.workers,
        force=arguments.force,
    )
    Console(highlight=False).print(made.table())
    print(f"data.path={arguments.out} data.tokenizer={made.tokenizer}")


def _bench(arguments: argparse.Namespace) -> None:
    from rich.console import Console

    from fp4pretrain.bench import kernels, linear, timing
    from fp4pretrain.config import compose, plan_of
    from fp4pretrain.ops import choose

    if arguments.what == "kernels":
        if arguments.overrides:
            raise UserError(
                f"{arguments.overrides[0]}: bench kernels follows no recipe; leave the key out, or "
                "use bench linear"
            )
        found = kernels.bench_kernels()
        shown = kernels.table(found)
    else:
        device = timing.require_gpu()
        recipes = {}
        for name in arguments.precision.split(","):
            config = compose([f"precision={name}", *arguments.overrides])
            p, plan = config.precision, plan_of(config)
            backend, _ = choose(p.backend, plan, device, mxfp4_emulation=p.mxfp4_emulation)
            recipes[name] = backend, plan.recipe
        found = linear.bench_linear(recipes)
        shown = linear.table(found)
    Console(highlight=False).print(shown)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"{arguments.what}.json"
    write_text(path, json.dumps(found, indent=1))
    print(path)


def _quiet_libraries() -> None:
    """What megatron-core says of every run and no user can act on: apex and Transformer Engine are
    missing (neither is used), its other model class is newer, its collectives have new names."""
    warnings.filterwarnings("ignore", module="megatron")
    warnings.filterwarnings("ignore", message=".*Transformer Engine and Apex.*")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # that its cache is a temporary one
