"""``fp4pretrain data``: datasets and tokenizers are made and looked at."""

from __future__ import annotations

import argparse
from typing import Any

from fp4pretrain.cli.parser import add_verb

DATA_HELP = """\
Build and look at datasets: Megatron indexed datasets (PREFIX.bin, PREFIX.idx).

  fp4pretrain data build notes/ more.jsonl --out data/notes             bytes
  fp4pretrain data build web.jsonl.zst --text-key content --out data/web
  fp4pretrain data train-bpe notes/ --vocab-size 8192 --out bpe.json    a tokenizer of your own
  fp4pretrain data build notes/ --out data/notes --tokenizer bpe.json
  fp4pretrain data inspect data/notes
  fp4pretrain data verify data/notes                                    every byte against its manifest
  fp4pretrain data build asked.jsonl --prompt-key prompt --text-key completion --out data/asked
  fp4pretrain data corpus --out data/text                               text that this machine has
  fp4pretrain data corpus torch notes/ linux-doc --out data/text        packages, folders, Debian packages

Inputs: text, .jsonl and .ndjson (an object a line), .json (the same, or one array), each also as .gz or
.zst, .parquet (a column of text), Hugging Face datasets on disk, folders of them, and stdlib (this
Python's standard library).
"""


def add(verbs: Any) -> None:
    """Add this module's verbs to ``fp4pretrain``."""
    data = add_verb(verbs, "data", "build, inspect and tokenize datasets", DATA_HELP, _data)
    _data_jobs(data)


def _data_jobs(data: argparse.ArgumentParser) -> None:
    jobs = data.add_subparsers(title="jobs", required=True, metavar="JOB", dest="job")
    build = jobs.add_parser("build", help="text or JSON files to an indexed dataset")
    build.add_argument("--out", required=True, metavar="PREFIX")
    build.add_argument(
        "--tokenizer",
        default="byte",
        help="byte, a tokenizer.json, a SentencePiece .model, a .tiktoken file, or a HF folder",
    )
    build.add_argument("--force", action="store_true", help="replace a dataset that is there")
    bpe = jobs.add_parser("train-bpe", help="train a byte-level BPE tokenizer")
    for job in (build, bpe):
        job.add_argument("inputs", nargs="+", metavar="FILE or DIR or stdlib")
        job.add_argument(
            "--text-key", default="text", metavar="KEY", help="of JSON objects, or a column"
        )
        job.add_argument(
            "--on-error", choices=("stop", "skip"), default="stop", help="at a broken record"
        )
    build.add_argument(
        "--prompt-key", metavar="KEY", help="of what comes before the text and is not predicted"
    )
    bpe.add_argument("--vocab-size", type=int, required=True)
    bpe.add_argument("--out", required=True, metavar="tokenizer.json")
    inspect = jobs.add_parser("inspect", help="what is in an indexed dataset")
    inspect.add_argument("prefix", metavar="PREFIX")
    inspect.add_argument("--tokenizer", help="to show the text; default: the one it was built with")
    verify = jobs.add_parser("verify", help="hold datasets against the hashes of their manifests")
    verify.add_argument("prefixes", nargs="+", metavar="PREFIX")
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


def _data(arguments: argparse.Namespace) -> None:
    from fp4pretrain import data

    if arguments.job == "inspect":
        data.inspect(arguments.prefix, tokenizer=arguments.tokenizer)
        return
    if arguments.job == "verify":
        for prefix in arguments.prefixes:
            print(data.verify(prefix))
        return
    if arguments.job == "corpus":
        _corpus(arguments)
        return
    reading = data.Reading(
        arguments.text_key,
        prompt_key=getattr(arguments, "prompt_key", None),
        skip=arguments.on_error == "skip",
    )
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
