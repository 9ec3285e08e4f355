"""README and docs/: commands parse, keys exist and take their values, links, images and anchors of files are
there, tables have the numbers of their results, and the site names every page and all of the public API.

What is typed is read from code blocks and from `inline code`; nothing is run. The strict build of
`make check` holds anchors too.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fp4pretrain import cli
from fp4pretrain.config import RunConfig, compose, schema_keys
from fp4pretrain.errors import UserError
from fp4pretrain.overrides import expand_sweep, refuse_unknown
from fp4pretrain.presets import groups
from fp4pretrain.units import tokens_of

ROOT = Path(__file__).resolve().parents[3]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
PARSER = cli.parser()
# what starts training with keys, and has a verb neither before nor after
LAUNCHERS = ("launch/torchrun.sh", "launch/slurm.sbatch")
PLACEHOLDERS = {"...", "N", "NAME", "VALUE"}
# Verbs and jobs that need more words, as prose names them.
_VERBS = (
    "train",
    "compare",
    "noise",
    "generate",
    "eval",
    "export",
    "culprit",
    "bench",
    "data build",
    "data corpus",
)


def _blocks(page: Path) -> list[tuple[str, str]]:
    """(language, text) of each code block."""
    return [(found[2], found[3]) for found in FENCE.finditer(page.read_text(encoding="utf-8"))]


def _lines(page: Path) -> Iterator[str]:
    """Lines of code blocks, continued ones joined and variables of their block put in; inline code."""
    for language, text in _blocks(page):
        if language in ("yaml", "python"):
            continue
        variables: dict[str, str] = {}
        for line in re.sub(r"\\\n\s*", "", text).splitlines():
            if assigned := re.fullmatch(r'([A-Z]+)="(.*)"', line.strip()):
                variables[assigned[1]] = assigned[2]
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            yield line.strip()
    prose = FENCE.sub("", page.read_text(encoding="utf-8"))
    for found in re.finditer(r"`([^`]+)`", prose):
        yield " ".join(found[1].split())


def _commands(page: Path) -> Iterator[list[str]]:
    """What fp4pretrain is given, of every line that calls it or a launcher."""
    for line in _lines(page):
        if not re.search(r"fp4pretrain [a-z-]|launch/\w+\.s", line):
            continue
        words = shlex.split(line, comments=True)
        for number, word in enumerate(words):
            rest = words[number + 1 :]
            if word.endswith(LAUNCHERS):
                own = ("--print", "fp4pretrain")  # an option of the script; the image it is in
                yield ["train", *(one for one in rest if one not in own)]
                break
            elif word.split("/")[-1] == "fp4pretrain" and _starts(words[:number]) and rest:
                yield rest


def _starts(before: list[str]) -> bool:
    """Whether a word after these is the program: alone, after torchrun's options, in an image."""
    return not before or before[-1] == "-m" or "docker" in before


def _parsed(words: list[str]) -> argparse.Namespace:
    """As ``cli.main`` does. Raises UserError."""
    arguments, rest = PARSER.parse_known_args(words)
    cli._take_rest(arguments, rest)
    return arguments


def _typed() -> list[tuple[str, list[str]]]:
    """(page, words) of every command; those that print help, or name a verb and no more, left out."""
    found = []
    for page, name in zip(PAGES, NAMES, strict=True):
        for words in _commands(page):
            named = words[0] == "VERB" or " ".join(words) in _VERBS
            if not named and not {"--help", "--version", "-h"} & set(words):
                # "..." stands for what was said before: more keys, or the runs
                keys = words[0] in ("train", "audit", "noise")
                given = ["runs/x" if word == "..." else word for word in words]
                found.append((name, [word for word in given if not keys or word != "runs/x"]))
    return found


TYPED = _typed()


def _runs(words: list[str]) -> list[list[str]]:
    """The overrides of each run that a command starts; none where it starts none."""
    arguments = _parsed(words)
    overrides = getattr(arguments, "overrides", None)
    if overrides is None:
        return []
    return expand_sweep(overrides) if getattr(arguments, "multirun", False) else [overrides]


def test_commands_are_found() -> None:
    """All verbs are in README, so the search has not missed its object."""
    shown = {words[0] for name, words in TYPED if name == "README.md"}
    verbs = {"train", "compare", "noise", "data", "audit", "culprit", "generate", "eval", "export"}
    assert verbs | {"doctor", "bench", "dashboard", "launch"} <= shown
    assert len(TYPED) > 60


@pytest.mark.parametrize("name", sorted({name for name, _ in TYPED}))
def test_commands_parse_and_keys_take_their_values(name: str) -> None:
    for page, words in TYPED:
        if page != name:
            continue
        try:
            for overrides in _runs(words):
                given = [one for one in overrides if not _stands_for(one)]
                if getattr(_parsed(words), "config_dir", None):  # options of the reader's own
                    given = [one for one in given if one.partition("=")[0] not in groups()]
                refuse_unknown(given, keys=schema_keys())
                _check_values(given)
        except (UserError, OmegaConfBaseException) as error:
            pytest.fail(f"fp4pretrain {shlex.join(words)}\n{error}")


def _stands_for(override: str) -> bool:
    """Whether the value is a word for the reader's own: ``model.vocab_size=N``, ``optim.lr=...``."""
    value = override.partition("=")[2]
    return value in PLACEHOLDERS or value.startswith("my/")  # a file of the reader's own


def _check_values(overrides: list[str]) -> None:
    """Every key takes its value: the schema's types, without composing (half a second each)."""
    config = OmegaConf.structured(RunConfig())
    for text in overrides:
        key, _, value = text.partition("=")
        if key in groups() or key.startswith(("precision.rules.", "data.")):
            continue
        OmegaConf.update(config, key, yaml.safe_load(value), merge=True)


def _composed_whole() -> list[tuple[str, ...]]:
    """One command for each combination of keys in the recipe's grammar, and every experiment."""
    chosen: dict[frozenset[str], tuple[str, ...]] = {}
    for _, words in TYPED:
        with contextlib.suppress(UserError):  # the test above says which and why
            overrides = next(iter(_runs(words)), [])
            keys = frozenset(one.partition("=")[0] for one in overrides)
            if any(key.startswith("precision.") or key == "experiment" for key in keys):
                known = [one for one in overrides if not _stands_for(one)]
                chosen.setdefault(keys, tuple(known))
    return sorted(chosen.values())


@pytest.mark.parametrize("overrides", _composed_whole(), ids=" ".join)
def test_recipes_typed_on_the_command_line_compose(overrides: tuple[str, ...]) -> None:
    compose([one for one in overrides if not one.startswith("baseline=runs/")])


def test_the_recipe_file_that_is_shown_composes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """docs/own-recipe.md's file, its keys given as overrides of the recipe that it begins from."""
    (text,) = (t for kind, t in _blocks(ROOT / "docs/own-recipe.md") if kind == "yaml")
    shown = yaml.safe_load(text)
    base, itself = shown.pop("defaults")
    assert itself == "_self_"
    assert re.findall(r"precision/(\w+)\.yaml", text) == [shown.pop("name")]
    config = compose([f"precision={base}", "model=gpt_1_3b", *_flat(shown, "precision")])
    assert config.precision.wgrad.rotation.size == 32
    assert set(config.precision.rules) == {"fc2_y"}


def _flat(node: object, prefix: str) -> list[str]:
    if isinstance(node, dict):
        return [one for key, value in node.items() for one in _flat(value, f"{prefix}.{key}")]
    if isinstance(node, list):
        return [f"{prefix}=[{','.join(repr(one) for one in node)}]"]
    return [f"{prefix}={node!r}"]


def _keys_and_defaults(page: Path) -> Iterator[tuple[str, str]]:
    """Rows of the tables of keys and defaults; `a.b`, `c` in one row are a.b and a.c."""
    for names, (default, *_) in _table_rows(page, "| key | default |").items():
        keys = re.findall(r"`([\w.]+)`", names)
        section = keys[0].rpartition(".")[0] if keys else ""
        full = [key if "." in key or not section else f"{section}.{key}" for key in keys]
        yield from zip(full, default.split(", ") if len(full) > 1 else [default], strict=False)


def test_tables_of_keys_have_the_defaults() -> None:
    """Those of the schema, unless a model preset brings its own ("by model")."""
    rows = [row for page in PAGES for row in _keys_and_defaults(page)]
    assert len(rows) > 20
    config = OmegaConf.structured(RunConfig())
    for key, default in rows:
        assert key in schema_keys(), key
        if default != "by model":
            told = tokens_of(default, key=key) if default == "4M" else yaml.safe_load(default)
            assert OmegaConf.select(config, key) == told, key


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_and_images_are_there(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+://|mailto:", target):
            continue
        path, _, anchor = target.partition("#")
        there = page if not path else page.parent / path
        if path == "index.md":  # README, where it is a page of the site
            there = ROOT / "README.md"
        assert there.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.+)$", there.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", t.lower())) for t in titles}
            assert anchor in slugs, target


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_files_that_are_named_exist(page: Path) -> None:
    """`configs/...`, `scripts/...`, `tests/...`, `docs/...` and `launch/...`, without placeholders."""
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for name in re.findall(r"`((?:configs|scripts|tests|docs|launch)/[\w./-]+)`", text):
        if not re.search(r"NAME|GROUP|mine", name):
            assert (ROOT / name).exists(), name


def _table_rows(page: Path, wanted: str) -> dict[str, list[str]]:
    """Rows of the tables whose header has the word, by their first cell."""
    rows, inside = {}, False
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")] if line[:1] == "|" else []
        inside = bool(cells) and (inside or wanted in line)
        if inside:
            rows[cells[0]] = cells[1:]
    return rows


def test_tables_of_gpt_10m_are_its_results() -> None:
    """README's, the gallery's and the pairs of docs/believing.md, against compare.json."""
    found = json.loads((ROOT / "docs/results/gpt_10m/compare.json").read_text(encoding="utf-8"))
    results = {one["name"]: one for one in found["results"]}
    readme = _table_rows(ROOT / "README.md", "gap to BF16")
    gallery = _table_rows(ROOT / "docs/gallery.md", "nats")
    believing = _table_rows(ROOT / "docs/believing.md", "of the same seed")
    names = {
        "FP8": "fp8",
        "NVFP4, ~15% of the blocks BF16": "nvfp4",
        "NVFP4, every block": "nvfp4_all",
        "MXFP4, H16": "mxfp4_h16",
        "MXFP4, no rotation": "mxfp4_plain",
    }
    for title, name in names.items():
        one = results[name]
        gap = f"{100 * one['gap']:+.2f} ± {50 * (one['high'] - one['low']):.2f}%"
        more = one["tokens_to_equal_loss"]
        assert readme[title][:3] == [f"{one['loss']:.4f}", gap, one["verdict"]]
        assert readme[title][4:] == [f"{100 * more:.1f}%", str(len(one["seeds"]))]
        assert believing[title] == [
            *[f"{100 * pair:+.2f}%" for pair in one["pairs"]],
            *[""] * (3 - len(one["pairs"])),
            gap,
        ]
        assert gallery[title][0].startswith(f"{one['nats']:+.4f} ± ")
        assert gallery[title][1].startswith(f"{100 * more:.1f} ± ")
        assert gallery[title][4] == f"{one['tokens_per_second']:,.0f}"


def _public(package: Path) -> list[str]:
    """`__all__` of a package, read and not imported."""
    for node in ast.parse((package / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return list(ast.literal_eval(node.value))
    return []


def test_the_reference_has_the_public_api() -> None:
    """Every package with an ``__all__`` has its place, and so has a function that its module is named
    after: the package's entry would show the module in its place, and mkdocstrings leaves modules out."""
    pages = [page.read_text(encoding="utf-8") for page in (ROOT / "docs/api").glob("*.md")]
    entries = set(re.findall(r"^::: (\S+)$", "\n".join(pages), re.MULTILINE))
    for package in sorted((ROOT / "fp4pretrain").iterdir()):
        if not (package / "__init__.py").is_file() or not _public(package):
            continue
        name = f"fp4pretrain.{package.name}"
        if package.name == "cli":
            continue
        assert name in entries
        for one in _public(package):
            if (package / f"{one}.py").exists():
                assert f"{name}.{one}.{one}" in entries


def test_every_page_is_in_the_navigation() -> None:
    """Which the strict build says too, after it has built everything."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    nav = set(re.findall(r": ([\w/-]+\.md)$", text, re.MULTILINE))
    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert nav == pages | {"index.md"}


def test_every_recipe_and_picture_has_its_place() -> None:
    """docs/recipes.md has each file of configs/precision, the gallery each picture of docs/images."""
    first = re.findall(
        r"^\| `(\w+)` \|", (ROOT / "docs/recipes.md").read_text(encoding="utf-8"), re.M
    )
    listed = set(first) - {"period", "window", "ratio", "start"}  # keys of deoscillation
    assert listed == set(groups()["precision"])
    gallery = (ROOT / "docs/gallery.md").read_text(encoding="utf-8")
    for picture in (ROOT / "docs/images").iterdir():
        assert f"images/{picture.name}" in gallery
