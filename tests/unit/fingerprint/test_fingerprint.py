"""A fingerprint sees every key of the config that shapes the curve: generated over the schema."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from fp4pretrain import fingerprint
from fp4pretrain.config import RunConfig, compose, plan_of
from fp4pretrain.errors import UserError
from fp4pretrain.naming import shortest

DATA = {fingerprint.ORDER: "o", fingerprint.VALIDATION: {"validation": {"digest": "v"}}}
BY_CONTENT = {key for keys in fingerprint.BY_CONTENT.values() for key in keys}
# The value of a key -> another one, where adding one or another letter would not do.
OTHERS = {
    "model.activation": "gelu",
    "model.num_query_groups": 1,
    "model.kv_channels": 128,
    "model.attention_softcap": 50.0,
    "optim.warmup": 0.3,
    "optim.decay": 0.4,
    "data.seed": 5,
    "precision.amax": "rank",
    "precision.mxfp4_emulation": "bf16",
    "precision.keep.first_blocks": 1,
    "precision.keep.last_blocks": 2,
    "precision.keep.modules": ["*.linear_qkv"],
    "precision.tail.at": 0.5,
    "precision.tail.to_bf16": ["wgrad"],
    "format": "fp8_e5m2",
    "block": "2d",
    "rounding": "stochastic_full",
    "ties": "away",
    "scale": "cap256",
    "kind": "hadamard",
    "resample": "step",
    "dtype": "fp32",
    "signs": "seed",
    "size": 32,
    "source": "forward",
    "split": "channels",
    "amax": "fixed",
    "start": 0.5,
}
# Numbers that count beside another knob alone.
BESIDE = {"channels": "split=channels", "amax_value": "amax=fixed", "amax_steps": "amax=held"}
BESIDE |= dict.fromkeys(("window", "ratio", "start"), "period=8")
BESIDE |= dict.fromkeys(("size", "resample", "signs", "dtype"), "kind=random_hadamard")


def leaves(node: Any, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            yield from leaves(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}"


# a map of rules, not a value: the test of rules below
KEYS = [key for key in leaves(RunConfig()) if key != "precision.rules"]


def changed(config: RunConfig, key: str) -> RunConfig:
    """The config with another value of one key."""
    config = dataclasses.replace(config)
    node: Any = config
    *sections, name = key.split(".")
    for section in sections:
        setattr(node, section, dataclasses.replace(getattr(node, section)))
        node = getattr(node, section)
    value = getattr(node, name)
    other = OTHERS.get(key, OTHERS.get(name) if key.startswith("precision.") else None)
    if other is None:
        other = not value if isinstance(value, bool) else f"{value}x"
        if isinstance(value, int | float) and not isinstance(value, bool):
            other = value * 2 + 1
    if other == value:
        other = {"format": "fp8_e4m3", "block": "1d", "signs": "te", "rounding": "nearest"}[name]
    setattr(node, name, other)
    return config


@cache
def base_for(key: str) -> RunConfig:
    """With a switch late in the run, so that what it switches to matters; in FP8 where a format
    changes, since the two of one GEMM must be of one family."""
    recipe = "fp8" if key.endswith(".format") else "nvfp4"
    section, _, name = key.rpartition(".")
    beside = (
        [f"{section}.{BESIDE[name]}"] if key.startswith("precision.") and name in BESIDE else []
    )
    if name == "channels" and section.startswith("precision.wgrad"):
        beside.append("precision.wgrad.rotation.kind=none")
    return compose([f"precision={recipe}", "precision.tail.at=0.9", *beside])


def digests(config: RunConfig) -> tuple[str, str]:
    found = fingerprint.whole(config, plan_of(config), DATA)
    return found["digest"], found["plan"]


@pytest.mark.parametrize("key", KEYS)
def test_every_key_is_in_the_fingerprint_or_harmless_for_a_reason(key: str) -> None:
    base = base_for(key)
    harmless = fingerprint.within(key, fingerprint.HARMLESS)
    content = key in BY_CONTENT and key != "data.seed"
    try:
        moved = [a != b for a, b in zip(digests(changed(base, key)), digests(base), strict=True)]
    except UserError as refused:  # the recipe knows no such cast, of which a plan could be made
        assert key.startswith("precision.")
        assert f"precision.{key.split('.')[1]}" in str(refused)
        return
    if harmless or content:
        assert moved == [False, False]
    elif key.startswith("precision."):
        assert moved == [False, True]  # so that one can ask for "differs in its recipe alone"
    else:
        assert moved[0]
        assert moved[1] == (key == "model.num_layers")


def test_runs_from_before_a_key_was_there_keep_their_fingerprint() -> None:
    """Digests that were written before the data section could mask documents."""
    for digest, overrides in (
        ("6b65c24685fe4336", []),
        ("e13b63b296e7a31b", ["precision=nvfp4", "model=gpt_10m"]),
    ):
        assert digests(compose(overrides))[0] == digest
    masked, plain = (
        fingerprint.entries(compose([f"data.document_mask={given}"])) for given in ("true", "false")
    )
    assert fingerprint.differing(masked, plain) == {"data.document_mask": (True, False)}


def test_a_rule_is_in_the_plan_s_digest_whatever_it_is_called() -> None:
    fc2 = ["recipe=fp8", "linears=[fc2]"]

    def of(*rules: str) -> tuple[str, str]:
        return digests(compose([f"precision.rules.{rule}" for rule in rules]))

    base = of()
    named, renamed = (of(*(f"{name}.{part}" for part in fc2)) for name in ("a", "b"))
    assert named[0] == base[0] and named[1] != base[1]
    assert renamed == named
    assert of(*(f"a.{part}" for part in fc2), "a.start=0.5") != named


def test_refused_casts_are_few() -> None:
    """The test above is about values that can be had: a few keys of 80 have no other."""
    refused = []
    for key in KEYS:
        try:
            digests(changed(base_for(key), key))
        except UserError:
            refused.append(key)
    assert len(refused) < 20, refused


def test_reasons_name_keys_that_exist() -> None:
    for key, reason in fingerprint.HARMLESS.items():
        assert any(one == key or one.startswith(f"{key}.") for one in KEYS), key
        assert len(reason) > 10
    assert set(KEYS) >= BY_CONTENT


def test_spellings_of_one_run_have_one_fingerprint() -> None:
    """Warmup as steps, tokens or a fraction; a seed left out; blocks as a number or a share; a name."""
    one = digests(compose(["optim.warmup=0.2", "precision.keep.last_blocks=0.25"]))
    for other in (
        ["optim.warmup=60", "precision.keep.last_blocks=1", "precision.name=mine"],
        [
            "train.tokens=307200",
            "optim.warmup=60",
            "data.seed=1234",
            "precision.keep.last_blocks=1",
        ],
        ["train.tokens=307.2K", "optim.warmup=61.44K", "data.split='98,2'", "run_dir=x"],
    ):
        assert digests(compose(other)) == one
    assert digests(compose(["optim.warmup=0.2", "data.seed=1"]))[0] != one[0]


def test_a_recipe_is_its_plan_whatever_it_is_called() -> None:
    plain = compose(["precision=nvfp4"])
    for other in (
        ["precision=nvfp4", "precision.name=other"],
        ["precision=nvfp4", "precision.backend=reference"],
        ["precision=nvfp4", "precision.tail.to_bf16=[wgrad]"],  # no tail
    ):
        assert digests(compose(other))[1] == digests(plain)[1]
    assert digests(compose(["precision=fp8"]))[1] != digests(plain)[1]
    assert digests(compose(["precision=fp8"]))[0] == digests(plain)[0]


@pytest.mark.parametrize(
    ("named", "says"),
    [
        (["optim.lx"], "'optim.lx' is nothing .* did you mean optim.lr"),
        (["logging"], "'logging' is nothing"),
        (["checkpoint.interval"], "'checkpoint.interval' is nothing"),
    ],
)
def test_what_can_be_named(named: list[str], says: str) -> None:
    keys = {*KEYS, "optim", "precision", "logging", "checkpoint", "data"}
    for good in (
        ["optim.lr", "precision"],
        ["data.order"],
        ["precision.fprop.x.format", "data"],
        [],
    ):
        fingerprint.check_names(good, keys)
    with pytest.raises(UserError, match=f"^resume_with: {says}"):
        fingerprint.check_names(named, keys)


def test_the_shortest_tail_of_a_key_is_no_others() -> None:
    for key in KEYS:
        tail = shortest(key, KEYS)
        others = [k for k in KEYS if k != key and (k == tail or k.endswith(f".{tail}"))]
        assert others == [] or tail == key
    assert shortest("precision.wgrad.rotation.kind", KEYS) == "wgrad.rotation.kind"
    assert shortest("optim.lr", KEYS) == "lr"
    assert shortest("data.seed", KEYS) == "data.seed"
