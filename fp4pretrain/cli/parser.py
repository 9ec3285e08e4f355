"""What all verbs share of argparse: one-line complaints, paths with ~, and how a verb is added."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from fp4pretrain.errors import UserError
from fp4pretrain.files import user_path


class Parser(argparse.ArgumentParser):
    """argparse, with its complaints as one line like any other."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def path(text: str) -> Path:
    """A path of the command line; ``--out=~/x`` reaches us as it is, no shell reads a ~ there."""
    return user_path(text, key="path")


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Keys of the run config, and where options of groups are looked for first."""
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    add_config_dir(parser)


def add_config_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config-dir",
        type=path,
        metavar="DIR",
        help="of your own YAML files (DIR/precision/NAME.yaml, ...), searched first",
    )


def add_verb(
    verbs: Any, name: str, summary: str, text: str, work: Callable[[argparse.Namespace], None]
) -> argparse.ArgumentParser:
    """A verb of ``fp4pretrain``: ``summary`` in the list of verbs, ``text`` in its own help."""
    added: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=summary,
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    added.set_defaults(work=work)
    return added
