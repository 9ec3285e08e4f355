"""``fp4pretrain completion``: verbs and options for a shell's Tab key."""

from __future__ import annotations

import argparse
from typing import Any

from fp4pretrain.cli.parser import add_verb
from fp4pretrain.errors import UserError

COMPLETION_HELP = """\
Print what makes a shell complete verbs and options (pip install shtab first).

  eval "$(fp4pretrain completion bash)"                                        this shell
  fp4pretrain completion bash > ~/.local/share/bash-completion/completions/fp4pretrain
  fp4pretrain completion zsh > ~/.zfunc/_fp4pretrain
"""


def add(verbs: Any) -> None:
    """Add this module's verbs to ``fp4pretrain``."""
    completion = add_verb(verbs, "completion", "for a shell's Tab key", COMPLETION_HELP, _print)
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"))


def _print(arguments: argparse.Namespace) -> None:
    from fp4pretrain.cli import parser

    try:
        import shtab
    except ImportError:
        raise UserError("completion: shtab is not here; pip install shtab") from None
    print(shtab.complete(parser(), arguments.shell))
