"""Rules that a measured quantity turns on and off: counting, hysteresis, resume, events, refusals."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fp4pretrain.config import compose, plan_of
from fp4pretrain.errors import UserError
from fp4pretrain.precision import BF16, Progress, parse_trigger
from fp4pretrain.train.hooks.triggers import Triggers, remembered
from fp4pretrain.train.main import train
from fp4pretrain.train.trainer import TRIGGERS

SMALL = (
    "model.num_layers=2 model.hidden_size=64 model.num_attention_heads=2 model.ffn_hidden_size=96 "
    "model.seq_length=32 train.micro_batch=2 train.global_batch=2 train.steps=6 train.log_interval=1 "
    "train.eval_interval=0 data.valid_tokens=128 data.mock=true logging=quiet optim.warmup=0 "
    "optim.decay=0 logging.wandb.mode=disabled precision=nvfp4 precision.keep.last_blocks=0 "
    "precision.rules.finish.recipe=bf16 precision.rules.finish.gemms=[dgrad,wgrad]"
).split()
NOISE = ["observe.interval=2", "observe.statistics=[gradient_noise]"]


class Silent:
    """The part of Logging that Triggers needs."""

    def listen(self, listener) -> None:
        self.hear = listener


def decide(rules: list, memory: dict, losses: list[float]) -> list[tuple[int, str, bool]]:
    hook, found = Triggers(Silent()), []
    for step, loss in enumerate(losses):
        for change in hook._decide(rules, memory, loss):
            found.append((step, change["rule"], change["holds"]))
    return found


def rules_of(*overrides: str) -> list:
    return list(
        plan_of(compose([*SMALL, *(f"precision.rules.finish.{o}" for o in overrides)])).rules
    )


def test_a_condition_has_to_hold_so_often_and_its_release_too() -> None:
    rules = rules_of("trigger='loss_ratio > 1.5 for 2'", "release='loss_ratio < 1.1 for 3'")
    calm = [1.0] * 32
    losses = [*calm, 2.0, 1.0, 2.0, 2.0, 1.0, 1.0, 2.0, 1.0, 1.0, 1.0, 1.0]
    #         32     one alone     two: fires at 35   released at the third calm step after 38
    assert decide(rules, remembered({}), losses) == [(35, "finish", True), (41, "finish", False)]
    # what is remembered goes through JSON, as a checkpoint keeps it, and goes on in the middle
    memory = remembered({})
    first = decide(rules, memory, losses[:35])
    memory = remembered({TRIGGERS: json.loads(json.dumps(memory))})
    again = [(step + 35, *rest) for step, *rest in decide(rules, memory, losses[35:])]
    assert first == [] and again == [(35, "finish", True), (41, "finish", False)]


def test_a_loss_that_is_no_number_counts_for_nothing() -> None:
    rules = rules_of("trigger='loss_ratio > 1.5'")
    memory = remembered({})
    assert decide(rules, memory, [1.0] * 32 + [math.nan, math.nan]) == []
    assert len(memory["losses"]) == 32


def test_a_plan_asks_which_triggers_fired() -> None:
    (rule,) = rules_of("trigger='loss_ratio > 2'", "start=0.5")
    plan = plan_of(compose([*SMALL, "precision.rules.finish.trigger='loss_ratio > 2'"]))
    before, after = Progress(3, 6), Progress(3, 6, fired=frozenset({"finish"}))
    place = (0, "mlp.linear_fc1")
    assert plan.at(*place, before).wgrad.x.quantized
    assert plan.at(*place, after).wgrad == BF16.wgrad and plan.at(*place, after).fprop.x.quantized
    assert plan.switches(before, after) and len(plan.recipes_of(*place)) == 2
    assert not rule.active(Progress(2, 6, fired=frozenset({"finish"})))  # not before start
    assert rule.active(after) and not rule.active(before)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["trigger='gap over 2'"], r"rules.finish.trigger: 'gap over 2' is no condition"),
        (["trigger='loss > 2'"], r"rules.finish.trigger: loss is not measured; use one of"),
        (
            ["trigger='gap > 0.01'"],
            r"does not measure gap: it needs a baseline; set baseline=RECIPE",
        ),
        (["trigger='gradient_to_noise < 1'"], r"does not measure .*set observe.interval"),
        (["release='loss_ratio < 1'"], r"rules.finish.release: there is no trigger"),
        (["trigger='loss_ratio > 2 for 0'"], r"is no condition"),
    ],
)
def test_what_cannot_fire_is_refused_while_composing(overrides: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        rules_of(*overrides)


def test_conditions_read_as_they_are_written() -> None:
    for text in ("gap > 0.02", "gradient_to_noise < 1 for 3", "loss_ratio > 1.5"):
        assert str(parse_trigger("k", text)) == text
    assert parse_trigger("k", None) is None


def test_a_run_switches_when_its_noise_reaches_the_gradient_and_resumes_exactly(
    tmp_path: Path,
) -> None:
    """The first measurement, after step 2, fires: dgrad and wgrad are in BF16 from step 3 on. A run that
    goes on from the checkpoint of step 3 has the losses of the run that never stopped."""
    run = [*SMALL, *NOISE, "precision.rules.finish.trigger='gradient_to_noise < 1e9'"]
    run += ["checkpoint.interval=3", "checkpoint.keep_last=9"]
    train(compose([*run, f"run_dir={tmp_path}/a"]))
    rows = [
        json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    ]
    (event,) = [row for row in rows if row["event"] == "trigger"]
    assert (event["step"], event["rule"], event["holds"]) == (2, "finish", True)
    assert event["why"] == "gradient_to_noise < 1e+09" and event["value"] > 0
    assert [row["step"] for row in rows if row.get("recipe_switched")] == [3]
    told = json.loads((tmp_path / "a" / "audit.json").read_text())["done"]["products"]
    # eight linears, one microbatch: dgrad and wgrad in NVFP4 for two steps of six, fprop in all
    assert told["nvfp4 x nvfp4"] == 8 * (2 * 2 + 6)

    half = tmp_path / "b"
    resumed = [*run, f"run_dir={half}", f"resume={tmp_path}/a/checkpoints/step_00000003"]
    train(compose(resumed))
    mine = [json.loads(line) for line in (half / "metrics.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows if row["event"] == "train"}
    assert {r["step"]: r["loss"] for r in mine if r["event"] == "train"} == {
        step: losses[step] for step in (4, 5, 6)
    }
