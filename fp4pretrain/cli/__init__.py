"""The command line: ``fp4pretrain VERB``. Parsing and printing only; the work is in the rooms.

A mistake of the user's (UserError) is one line on stderr and exit status 2. Each module of this folder
has some verbs: ``add(verbs)`` adds them, and what they run stands below it.
"""

from __future__ import annotations

import argparse
import errno
import logging
import sys
import warnings
from collections.abc import Sequence

from fp4pretrain import __version__
from fp4pretrain.cli import (
    comparing,
    completion,
    culprit,
    datasets,
    doctor,
    launching,
    machine,
    models,
    training,
)
from fp4pretrain.cli.parser import Parser
from fp4pretrain.console import plain_console
from fp4pretrain.errors import UserError
from fp4pretrain.parallel.launch import is_main
from fp4pretrain.presets import use_folder

# Errors of the file system, wherever they happen -> the cure.
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
        arguments, rest = parser().parse_known_args(argv)
        _take_rest(arguments, rest)
        if getattr(arguments, "config_dir", None) is not None:
            use_folder(arguments.config_dir)
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


def _take_rest(arguments: argparse.Namespace, rest: list[str]) -> None:
    """Add overrides that stand behind an option (``train a=1 -m b=2``): argparse returns them as unknown."""
    for text in rest:
        if text.startswith("-") or not hasattr(arguments, "overrides"):
            raise UserError(
                f"{text}: no such option; keys are set as key=value, options are in --help"
            )
        arguments.overrides.append(text)


def parser() -> argparse.ArgumentParser:
    """All verbs and their options."""
    made = Parser(
        prog="fp4pretrain",
        description="Pretrain GPT models in 4-bit floating point on megatron-core.",
        epilog="fp4pretrain VERB --help explains each verb.",
    )
    made.add_argument("--version", action="version", version=f"fp4pretrain {__version__}")
    verbs = made.add_subparsers(title="verbs", required=True, metavar="VERB")
    for group in (
        training,
        comparing,
        culprit,
        models,
        datasets,
        machine,
        doctor,
        launching,
        completion,
    ):
        group.add(verbs)
    return made


def _quiet_libraries() -> None:
    """Hide what megatron-core says in every run and no user can act on: apex and Transformer Engine are
    missing (neither is used), its other model class is newer, its collectives have new names."""
    warnings.filterwarnings("ignore", module="megatron")
    warnings.filterwarnings("ignore", message=".*Transformer Engine and Apex.*")
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    logging.getLogger("megatron").setLevel(logging.ERROR)
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # that its cache is a temporary one
