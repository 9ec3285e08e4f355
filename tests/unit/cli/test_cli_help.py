"""What the command line says of itself: help of every verb, version, completion, composed configs."""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

import pytest
import yaml

from fp4pretrain import __version__, cli

ROOT = Path(__file__).resolve().parents[3]


def test_cfg_prints_the_composed_config(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["train", "--cfg", "train.steps=7"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert printed["train"]["steps"] == 7
    assert printed["precision"]["wgrad"]["rotation"]["kind"] == "random_hadamard"


def test_cfg_of_a_sweep_prints_each_run_and_options_may_come_last(
    capsys: pytest.CaptureFixture[str],
) -> None:
    cli.main(["train", "train.steps=7", "--cfg", "-m", "seed=1,2"])
    printed = list(yaml.safe_load_all(capsys.readouterr().out))
    assert [(one["seed"], one["train"]["steps"]) for one in printed] == [(1, 7), (2, 7)]


def _commands(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every verb and job that the parser knows."""
    found = [path]
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, inner in action.choices.items():
                found += _commands(inner, (*path, name))
    return found


@pytest.mark.parametrize("command", _commands(cli.parser()), ids=" ".join)
def test_every_verb_explains_itself(
    command: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main([*command, "--help"])
    told = capsys.readouterr()
    assert caught.value.code == 0
    assert told.out.startswith(" ".join(["usage: fp4pretrain", *command]))
    assert told.err == ""
    assert max(map(len, told.out.splitlines())) < 140


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"fp4pretrain {__version__}\n"


def test_bash_completes_verbs_and_options(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    cli.main(["completion", "bash"])
    script = capsys.readouterr().out

    def completed(*words: str) -> set[str]:
        line = " ".join(f"'{word}'" for word in words)
        ask = f'COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; COMP_LINE="{" ".join(words)}"; '
        ask += "_shtab_fp4pretrain fp4pretrain; printf '%s\\n' \"${COMPREPLY[@]}\""
        done = subprocess.run(
            ["bash", "--norc", "-c", script + ask], capture_output=True, text=True, check=False
        )
        return set(done.stdout.split())

    assert {"export", "eval"} <= completed("fp4pretrain", "e")
    assert completed("fp4pretrain", "export", "--qu") == {"--quantize"}


def test_trains_help_lists_every_option_of_every_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    words = set(capsys.readouterr().out.split())
    for path in (ROOT / "configs").glob("*/*.yaml"):
        assert {path.parent.name, path.stem} <= words
