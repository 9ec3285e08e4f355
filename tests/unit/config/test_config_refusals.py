"""Bad input to ``compose``: one clear line that names the key and a cure, never a traceback."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from fp4pretrain import presets
from fp4pretrain.config import RunConfig, compose, composing, schema_keys
from fp4pretrain.errors import UserError
from fp4pretrain.overrides import expand_sweep

# Overrides -> the key that the line begins with, and a pattern of the rest.
REFUSED = [
    # keys
    ("modle=tiny", "modle", r"no such key; did you mean model\?.*--cfg"),
    ("train.step=3", "train.step", r"no such key; did you mean train\.steps\?"),
    (
        "precision.fprop.x.blok=1d",
        "precision.fprop.x.blok",
        r"did you mean precision.fprop.x.block",
    ),
    ("train={stepz: 5}", "train.stepz", r"no such key; did you mean train\.steps\?"),
    ("precision={fprop: {y: 1}}", "precision.fprop.y", r"no such key"),
    ("hydra.run.dir=x", "hydra.run.dir", r"no such key; did you mean run_dir\?"),
    ("hydra/launcher=x", "hydra/launcher", r"no such key"),
    ("model@other=tiny", "model@other", r"no such key"),
    ("+train.foo=1", "train.foo", r"no such key"),
    ("++train.foo=1", "train.foo", r"no such key"),
    ("++train={foo: 1}", "train", r"never added.*write train=VALUE"),
    ("+train.steps=4", "train.steps", r"never added.*write train\.steps=VALUE"),
    ("~train.steps", "train.steps", r"never added.*taken away"),
    ("~model", "model", r"taken away"),
    ("=3", "''", r"no such key"),
    # a rotation belongs to the GEMM: half of one cannot be written
    (
        "precision.wgrad.x.rotation=hadamard",
        "precision.wgrad.x.rotation",
        r"precision.wgrad.rotation",
    ),
    (
        "precision.wgrad.x.rotation.kind=hadamard",
        "precision.wgrad.x.rotation.kind",
        r"no such key; did you mean precision\.wgrad\.rotation\.kind\?",
    ),
    (
        "+precision.wgrad.x.rotation.kind=hadamard",
        "precision.wgrad.x.rotation.kind",
        r"no such key; did you mean precision\.wgrad\.rotation\.kind\?",
    ),
    ("++precision.fprop.w.rotation={kind: hadamard}", "precision.fprop.w.rotation", r"no such key"),
    # options of a group
    ("model=nope", "model", r"'nope' is unknown; choose .*tiny"),
    ("model=tiny.yaml", "model", r"choose .*tiny"),
    ("model=", "model", r"'' is unknown; choose .*tiny"),
    ("precision=null", "precision", r"null is unknown; choose .*nvfp4"),
    ("precision=[nvfp4,nope]", "precision", r"'nope' is unknown; choose .*nvfp4"),
    ("experiment=nope", "experiment", r"'nope' is unknown; choose .*late_switch"),
    ("baseline=nope", "baseline", r"'nope' is no recipe and no run's folder; choose .*fp8"),
    ("baseline=", "baseline", r"choose .*fp8"),
    # words
    ("precision.fprop.x.format=fp3", "precision.fprop.x.format", r"'fp3' .*nvfp4"),
    ("precision.dgrad.dy.rounding=up", "precision.dgrad.dy.rounding", r"'up'.*stochastic"),
    ("precision.fprop.x.scale=rceil", "precision.fprop.x.scale", r"'rceil' .*unbiased"),
    ("precision.wgrad.rotation.kind=dct", "precision.wgrad.rotation.kind", r"'dct'.*hadamard"),
    ("precision.wgrad.rotation.size=17", "precision.wgrad.rotation.size", r"17 .*16, 32"),
    ("precision.backend=cuda", "precision.backend", r"'cuda' is unknown; choose .*triton"),
    ("logging.wandb.mode=off", "logging.wandb.mode", r"'off' is unknown; choose .*disabled"),
    ('model.activation="a\\nb"', "model.activation", r"unknown; choose swiglu"),
    ("precision.name=a/b", "precision.name", r"'a/b'.*leave out the /"),
    # types
    ("train.steps=abc", "train.steps", r"'abc'.*give a whole number"),
    ("train.steps=1.5", "train.steps", r"give a whole number"),
    ("train.steps=1e9", "train.steps", r"give a whole number"),
    ("train.steps=true", "train.steps", r"give a whole number"),
    ("train.steps=nan", "train.steps", r"give a whole number"),
    ("train.steps=inf", "train.steps", r"give a whole number"),
    ("train.steps=[1]", "train.steps", r"give a whole number"),
    ("train.steps=", "train.steps", r"give a whole number"),
    ("train.steps=null", "train.steps", r"it cannot be null"),
    ("train.steps=???", "train.steps", r"give it a value"),
    ("train=5", "train", r"'5' is unknown; choose"),
    ("checkpoint=5", "checkpoint", r"set the keys inside it"),
    ("optim.lr=fast", "optim.lr", r"'fast'.*give a number"),
    ("data.mock=maybe", "data.mock", r"'maybe'.*give true or false"),
    ("data.mock=null", "data.mock", r"it cannot be null"),
    ("precision.fprop.x=mxfp4", "precision.fprop.x", r"set the keys inside it"),
    ("precision.fprop.x=null", "precision.fprop.x", r"it cannot be null"),
    ("precision.fprop.x.format=[a]", "precision.fprop.x.format", r"give a word"),
    ("precision.keep.modules=mlp", "precision.keep.modules", r"give a list such as \[a,b\]"),
    ("precision.keep.modules=[null]", "precision.keep.modules[0]", r"give a list of words"),
    ("logging.wandb.tags=a", "logging.wandb.tags", r"give a list"),
    ("name=[a]", "name", r"give a word"),
    # ranges
    ("train.steps=0", "train.steps", r"0 is out of range; give a number above 0"),
    ("train.steps=99999999999999999999", "train.steps", r"out of range; .*below 2\^31"),
    ("seed=-1", "seed", r"-1 is out of range; give a whole number from 0 to 2\^32 - 1"),
    ("seed=4294967296", "seed", r"out of range"),
    ("optim.lr=nan", "optim.lr", r"nan is out of range; give a number above 0"),
    ("optim.lr=inf", "optim.lr", r"inf is out of range"),
    ("optim.lr=-1", "optim.lr", r"-1.0 is out of range"),
    ("optim.beta2=1", "optim.beta2", r"1.0 is out of range; .*below 1"),
    ("optim.weight_decay=-0.1", "optim.weight_decay", r"out of range; give 0 or"),
    ("optim.clip=nan", "optim.clip", r"nan is out of range"),
    ("optim.warmup=1.5", "optim.warmup", r"neither a fraction .*, nor steps .*, nor tokens"),
    ("optim.warmup=300", "optim.warmup", r"all \d+ steps; use a smaller"),
    ("train.tokens=2m", "train.tokens", r"no number of tokens; write 2000000, 2M or 1.5B"),
    ("train.eval_batches=4", "train.eval_batches", r"no such key any more; .* data.valid_tokens"),
    ("data.valid=3", "data.valid", r"3 names no dataset; give null, some/prefix"),
    ("data.seed=-1", "data.seed", r"out of range; give a whole number"),
    ("model.attention_softcap=0", "model.attention_softcap", r"out of range"),
    ("resume_with=[optim.lx]", "resume_with", r"did you mean optim.lr"),
    ("optim.min_lr=5", "optim.min_lr", r"above optim\.lr=\S+; lower it"),
    ("optim.decay=0.96", "optim.decay", r"before the warmup ends.*lower"),
    ("train.eval_interval=-5", "train.eval_interval", r"out of range"),
    ("checkpoint.keep_last=0", "checkpoint.keep_last", r"out of range"),
    ("parallel.timeout_minutes=0", "parallel.timeout_minutes", r"out of range; give minutes"),
    ("guard.max_skipped=-1", "guard.max_skipped", r"out of range; give 0 or"),
    ("guard.spike.threshold=0", "guard.spike.threshold", r"out of range; give a number above 0"),
    ("guard.hang_timeout=-1", "guard.hang_timeout", r"out of range; give 0 or"),
    ("guard.hang_timeout=0.5", "guard.hang_timeout", r"shorter than steps are; give seconds"),
    ("guard.hang_action=stop", "guard.hang_action", r"'stop' is unknown; choose restart, report"),
    ("guard.spike.action=rollback", "guard.spike.action", r"set checkpoint\.interval"),
    ("model.num_query_groups=0", "model.num_query_groups", r"out of range"),
    ("model.kv_channels=-4", "model.kv_channels", r"out of range"),
    ("model.kv_channels=7", "model.kv_channels", r"heads of 7 .*even"),
    ("model.init_std=nan", "model.init_std", r"out of range"),
    ("precision.keep.first_blocks=nan", "precision.keep.first_blocks", r"nan is neither"),
    ("precision.keep.last_blocks=inf", "precision.keep.last_blocks", r"inf is neither"),
    ("precision.keep.last_blocks=1.5", "precision.keep.last_blocks", r"1.5 is neither"),
    ("precision.tail.at=2", "precision.tail.at", r"2 is no fraction.*0 to 1"),
    ("precision.tail.at=nan", "precision.tail.at", r"nan is no fraction"),
    # combinations
    ("model.num_query_groups=3", "model.num_query_groups", r"3 does not divide .*=4; change"),
    ("model.hidden_size=258", "model.num_attention_heads", r"4 does not divide .*=258; change"),
    (
        "train.global_batch=13",
        "train.global_batch",
        r"no multiple of train.micro_batch=\d+; change",
    ),
    ("precision.fprop.x.format=mxfp4", "precision.fprop", r"x is mxfp4 and w is nvfp4.*one family"),
    ("precision.fprop.x.block=2d", "precision.fprop.x.block", r"2d is for w.*use 1d"),
    ("precision.keep.modules=[nope]", "precision.keep.modules", r"matches no linear .*nope.*names"),
    ("precision.keep.first_blocks=4", "precision.keep", r"keeps all 4 blocks.*keep fewer"),
    ("precision.tail.to_bf16=[wgrat]", "precision.tail.to_bf16", r"'wgrat' is no GEMM; use fprop"),
    ("precision.tail={at: 0.5, to_bf16: []}", "precision.tail.to_bf16", r"nothing would be .*name"),
    # data.path
    ("data=indexed", "data.path", r"'' names no dataset; give .*prefix"),
    ("data.path=5", "data.path", r"5 names no dataset; give"),
    ("data.path=true", "data.path", r"True names no dataset"),
    ("data.path=[{prefix: a, wight: 2}]", "data.path[0].wight", r"no such key; use prefix"),
    ("data.path=???", "data.path", r"give it a value"),
    ("data.path={web: {prefix: a, wieght: 2}}", "data.path.web.wieght", r"no such key; use prefix"),
    # empty words
    ("run_dir=", "run_dir", r"empty; .*leave run_dir out"),
    ("name=''", "name", r"empty"),
    ("resume=", "resume", r"empty"),
    ("data.cache_dir=", "data.cache_dir", r"empty"),
    # interpolation
    ("train.steps=${foo}", "train.steps", r"'foo' not found; write the value itself"),
    ("train.steps=${train.steps}", "train.steps", r"Recursive"),
    ("train.steps=${name}", "train.steps", r"'None' for .* write the value"),
    ("precision.wgrad.rotation=${seed}", "precision.wgrad.rotation", r"set the keys inside it"),
    ("checkpoint=${model}", "checkpoint.num_layers", r"no such key"),
    ("logging.wandb.tags=${seed}", "logging.wandb.tags", r"give a list"),
    ("train.steps=${oc.env:NO_SUCH_VARIABLE}", "train.steps", r"NO_SUCH_VARIABLE"),
    ("name=${model}", "name", r"give a word|write the value itself"),
    # grammar
    ("foo", "foo", r"cannot be read; write key=value"),
    ("a=b=c", "a", r"cannot be read"),
    ('name="x', "name", r"cannot be read.*quotes.*name='x'"),
    ("run_dir=~/x", "run_dir", r"cannot be read.*quotes.*run_dir='~/x'"),
    ("name=caf\u00e9", "name", r"cannot be read.*name='caf"),
    ("name={a", "name", r"cannot be read"),
    ("name=a\nb", "name", r"cannot be read"),
    ("train.steps = 3", "'train.steps '", r"cannot be read"),
    ("--steps=3", "'--steps'", r"cannot be read"),
    ("seed=foo(1)", "seed", r"cannot be read"),
    ("seed=1,2", "seed", r"several values; sweep them with .*-m"),
    ("seed=choice(1,2)", "seed", r"several values"),
    ("data.split=0.9,0.1", "data.split", r"several values.*\"data.split='0.9,0.1'\""),
]


def _line(overrides: list[str]) -> str:
    with pytest.raises(UserError) as caught:
        compose(overrides)
    return str(caught.value)


@pytest.mark.parametrize(("override", "key", "rest"), REFUSED, ids=[row[0] for row in REFUSED])
def test_a_bad_override_is_one_line_with_key_and_cure(override: str, key: str, rest: str) -> None:
    line = _line([override])
    assert line.startswith(f"{key}: ")
    assert re.search(rest, line.removeprefix(f"{key}: "))
    assert "\n" not in line
    assert len(line) < 400


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.path={web: {prefix: a, weight: 2}, code: {prefix: b}}"],
        ["data=indexed", "data.path=some/prefix"],
        ["data.path=[a,{prefix: b, max_epochs: 2, max_tokens: 5M}]"],
        ["data.split='0.9,0.1'"],
        ["run_dir='~/a b'"],
        ["name=a-b_c.d"],
        ["train.global_batch=${train.micro_batch}"],
        ["precision.tail.at=0.82", "precision.tail.to_bf16=[fprop,wgrad]"],
        ["precision.keep.modules=['*.linear_qkv','layers.0.mlp.*']"],
        ["seed=4294967295"],
        ["optim.decay=0.8"],
        ["optim.warmup=1", "optim.decay=299"],
        ["optim.warmup=100K", "train.tokens=1M"],
        ["data.valid={a: x, b: y}"],
        ["train={steps: 7}"],
        ["logging.wandb.tags=[a,b]"],
        ["baseline=fp8"],
    ],
)
def test_what_is_meant_is_taken(overrides: list[str]) -> None:
    assert isinstance(compose(overrides), RunConfig)


def test_every_leaf_of_the_schema_is_set_without_a_plus() -> None:
    """A sweep overrides any knob: all of them at once, each to its default, give the defaults."""
    leaves = {k: _default(k) for k in schema_keys() if not dataclasses.is_dataclass(_default(k))}
    assert "precision.wgrad.rotation.resample" in leaves
    assert not any("x.rotation" in leaf for leaf in leaves)
    assert compose([f"{key}={json.dumps(value)}" for key, value in leaves.items()]) == RunConfig()


VALUES = [
    *("null", "nan", "-nan", "inf", "-inf", "1e400", "-1", "0", "1", "3", "1e-30", "0x10", "1_000"),
    *("99999999999999999999999", "-99999999999999999999", "true", "off", "abc", "a b", "''", '""'),
    *("", " ", "???", "[]", "[a]", "[[1],{a: 2}]", "{}", "{a: 1}", "{a: {prefix: 3}}", "${seed}"),
    *("${nope}", "${model}", "${oc.env:HOME}", "${", "}", "'", '"a', "[1", "{a", "a=b", "a,b", "$"),
    *(
        "choice()",
        "range(1)",
        "int(a)",
        "str(1)",
        "sort(3,1)",
        "\\",
        "\u00e9",
        "\U0001f4a5",
        "~",
        "*",
    ),
    *(
        "a\tb",
        "a\nb",
        "'a\nb'",
        "../..",
        "a" * 5000,
        "/",
        "@",
        "@a",
        "!",
        "#",
        "%",
        ":",
        "a:b",
        "\x00",
    ),
]
PREFIXES = [*[""] * 16, "+", "++", "~", " "]


def _mutants(lines: int) -> list[list[str]]:
    """Command lines of random overrides: keys of the schema, groups and wrecks of both, with odd
    values."""
    rng = random.Random(20251)
    keys = sorted(schema_keys()) + sorted(presets.groups())

    def mutant() -> str:
        key = rng.choice(keys)
        if rng.random() < 0.2:
            place = rng.randrange(len(key) + 1)
            key = (
                key[:place]
                + rng.choice([".", "x", "", "=", "/", "@", " ", "[0]"])
                + key[place + 1 :]
            )
        return f"{rng.choice(PREFIXES)}{key}={rng.choice(VALUES)}"

    return [[mutant() for _ in range(rng.choice((1, 1, 3, 5)))] for _ in range(lines)]


@pytest.mark.parametrize("part", range(6))
def test_odd_overrides_compose_or_are_refused_in_one_line(part: int) -> None:
    """150 seeded lines of some 360 mutants: a RunConfig or a UserError of one line that names a key."""
    lines = _mutants(150)
    assert sum(map(len, lines)) > 300
    for overrides in lines[part::6]:
        try:
            assert isinstance(compose(overrides), RunConfig)
        except UserError as error:
            line = str(error)
            assert re.match(r"\S.*: \S", line), (overrides, line)
            assert line.isprintable(), (overrides, line)


BROKEN_FILES = {
    "model/a.yaml": (
        "defaults: [schema, _self_]\nnum_layerz: 3\n",
        r"model\.num_layerz: no such key",
    ),
    "model/b.yaml": (
        "defaults: [schema, _self_]\nnum_layers: x\n",
        r"model\.num_layers: .*model/b",
    ),
    "model/c.yaml": ("num_layers: [1\nfoo: }\n", r"c\.yaml, line 2: .*correct the YAML"),
    "model/d.yaml": ("defaults: [schemo, _self_]\n", r"model/d\.yaml: .*schemo"),
    "model/e.yaml": ("- 3\n", r"model/e\.yaml: "),
    "precision/f.yaml": (
        "defaults: [schema, _self_]\nwgrad:\n  x: {format: nvfp4, rotation: hadamard}\n",
        r"precision\.wgrad\.x\.rotation: no such key; did you mean precision\.wgrad\.rotation",
    ),
    "experiment/g.yaml": (
        "# @package _global_\ndefaults: [{override /modle: tiny}]\n",
        r"experiment/g\.yaml: .*modle",
    ),
    "experiment/h.yaml": ("# @package _global_\ntrain: {stepz: 3}\n", r"train\.stepz: no such key"),
    "data/i.yaml": ("defaults: [schema, _self_]\nmock: nein\n", r"data\.mock: .*true or false"),
}


@pytest.mark.parametrize("file", sorted(BROKEN_FILES))
def test_a_broken_preset_is_one_line_that_finds_it(
    file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, pattern = BROKEN_FILES[file]
    folder = shutil.copytree(presets.config_dir(), tmp_path / "configs")
    (folder / file).write_text(text)
    monkeypatch.setattr(presets, "config_dir", lambda: folder)
    monkeypatch.setattr(composing, "config_dir", lambda: folder)
    group, option = file.removesuffix(".yaml").split("/")
    line = _line([f"{group}={option}"])
    assert re.search(pattern, line)
    assert line.isprintable()


SWEEPS = [
    (["seed=1"], [["seed=1"]]),
    (["seed=1,2", "optim.lr=0.1"], [["seed=1", "optim.lr=0.1"], ["seed=2", "optim.lr=0.1"]]),
    (["seed=range(0,3)"], [["seed=0"], ["seed=1"], ["seed=2"]]),
    (["seed=choice(3,1)"], [["seed=3"], ["seed=1"]]),
    (["data.split='0.9,0.1'"], [["data.split='0.9,0.1'"]]),
    (["logging.wandb.tags=[a,b]"], [["logging.wandb.tags=[a,b]"]]),
    (["data.split='1,1','2,1'"], [["data.split='1,1'"], ["data.split='2,1'"]]),
]


@pytest.mark.parametrize(("overrides", "runs"), SWEEPS)
def test_a_sweep_is_the_product_of_its_values(overrides: list[str], runs: list[list[str]]) -> None:
    assert expand_sweep(overrides) == runs
    assert all(isinstance(compose(run), RunConfig) for run in runs)


def test_two_axes_vary_the_last_one_fastest() -> None:
    runs = expand_sweep(["precision=bf16,fp8", "seed=1,2"])
    assert [(run[0][-4:], run[1]) for run in runs] == [
        *(("bf16", "seed=1"), ("bf16", "seed=2"), ("=fp8", "seed=1"), ("=fp8", "seed=2")),
    ]


@pytest.mark.parametrize(
    "override",
    ["seed=1,", "seed=range(1,5,0)", "precision=glob(*)", "seed=range(3,1)", "'", "a b=1,2"],
)
def test_a_sweep_that_cannot_be_expanded_is_one_line(override: str) -> None:
    with pytest.raises(UserError) as caught:
        expand_sweep([override])
    assert str(caught.value).isprintable()


def test_no_number_may_be_nan() -> None:
    floats = [key for key in schema_keys() if isinstance(_default(key), float)]
    assert len(floats) > 12
    for key in floats:
        assert _line([f"{key}=nan"]).startswith(f"{key}: "), key


def _default(key: str) -> Any:
    node: Any = RunConfig()
    for part in key.split("."):
        node = getattr(node, part)
    return node


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            f"logging.wandb.tags=[ok,{'t' * 65}]",
            "logging.wandb.tags: 't+' has 65 characters; wandb",
        ),
        (
            f"logging.wandb.name={'n' * 129}",
            "logging.wandb.name: it has 129 characters; wandb takes",
        ),
        (
            "logging.wandb.project='a/b'",
            "logging.wandb.project: 'a/b' holds /, which wandb does not",
        ),
    ],
)
def test_what_wandb_would_refuse_is_refused_before_it_costs_the_log(
    override: str, says: str
) -> None:
    assert re.match(says, _line([override]))


def test_a_group_that_may_be_empty_can_be_said_to_be() -> None:
    assert compose(["experiment=null"]) == compose([])
    assert _line(["model=null"]).startswith("model: null is unknown; choose")
