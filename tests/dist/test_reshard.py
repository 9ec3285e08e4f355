"""A checkpoint written on one layout goes on at another: the same state, bit for bit, the same curve.

Right after loading, the new layout saves what it loaded: every whole tensor (weights, FP32 masters,
both moments) and every number must be what was saved. That alone would not notice halves that are
swapped on the way in and out, so the run also goes on: its losses are the uninterrupted single
process's, within the tolerances of ``agreement``, with the noise of a stochastic recipe.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from agreement import LATER_LOSS, SMALL
from records import same_state
from safetensors.torch import save_file

from fp4pretrain.config import compose
from fp4pretrain.convert import export_megatron
from fp4pretrain.convert.tensors import tensors_of
from fp4pretrain.convert.weights import CheckpointWeights
from fp4pretrain.model.families import family_of
from fp4pretrain.model.layout import check_layout
from fp4pretrain.model.memory import state_bytes
from fp4pretrain.train.stored import StoredRun

STEPS = 2
RECIPE = ["precision=nvfp4", "train.global_batch=4"]
LAYOUTS = {
    "1": (1, []),
    "TP 2": (2, ["parallel.tensor=2"]),
    "TP 2 + SP": (2, ["parallel.tensor=2", "parallel.sequence=true"]),
    "PP 2": (2, ["parallel.pipeline=2"]),
    "PP 2 interleaved": (2, ["parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
    "DP 2": (2, []),
    "DP 2, plain optimizer": (2, ["parallel.distributed_optimizer=false"]),
    "TP 2 x DP 2": (4, ["parallel.tensor=2"]),
    "TP 2 x PP 2": (4, ["parallel.tensor=2", "parallel.pipeline=2"]),
}
PAIRS = [
    ("1", "TP 2"),
    ("TP 2 + SP", "1"),
    ("PP 2", "1"),
    ("DP 2", "TP 2 + SP"),
    ("TP 2 x DP 2", "1"),
    ("1", "TP 2 x DP 2"),
    ("PP 2 interleaved", "1"),
    ("TP 2 x PP 2", "PP 2 interleaved"),
]
# Masters of their own, and the two optimizers' states into one another.
PAIRS_BF16 = [
    ("TP 2 x DP 2", "PP 2"),
    ("1", "DP 2, plain optimizer"),
    ("DP 2, plain optimizer", "PP 2"),
]
BF16 = ["optim.params_dtype=bf16"]
# A window that is open when the checkpoint is written, and closes a step later.
SWINGING = [*BF16, "precision.deoscillation.period=3", "precision.deoscillation.ratio=2"]
PAIRS_SWINGING = [
    ("TP 2 x DP 2", "1"),
    ("1", "TP 2 x PP 2"),
    ("DP 2, plain optimizer", "DP 2"),
]
# Weights of BF16 round at 2^-9: a TP sum's last bit moves them by a step of 1/250 here and there.
BF16_LOSS = 4e-3

pytestmark = pytest.mark.xdist_group("ranks")

_begun: dict[tuple, dict] = {}


def begun(ranks, layout: str, extra: list[str]) -> dict:
    """A run of 2 x STEPS steps with a checkpoint in the middle, trained once for all pairs."""
    key = (id(ranks), layout, *extra)
    if key not in _begun:
        size, parallel = LAYOUTS[layout]
        run = [*SMALL, *RECIPE, *extra, *parallel]
        _begun[key] = ranks.run("checkpoint_tasks.begin", run, size=size, steps=STEPS)
    return _begun[key]


# A layout each way and the mixed ones; the others, whose parts are among these, with the long tests.
LONG = [("DP 2", "TP 2 + SP"), ("1", "TP 2 x DP 2"), ("DP 2, plain optimizer", "DP 2")]
TRIPS = (
    [(*pair, []) for pair in PAIRS]
    + [(*pair, BF16) for pair in PAIRS_BF16]
    + [(*pair, SWINGING) for pair in PAIRS_SWINGING]
)


@pytest.mark.parametrize(
    ("source", "target", "extra"),
    [pytest.param(*trip, marks=[pytest.mark.long] * (trip[:2] in LONG)) for trip in TRIPS],
    ids=lambda value: value if isinstance(value, str) else ",".join(value) or "fp32",
)
def test_another_layout_goes_on(ranks, source: str, target: str, extra: list[str]) -> None:
    saved = begun(ranks, source, extra)
    size, parallel = LAYOUTS[target]
    run = [*SMALL, *RECIPE, *extra, *parallel, f"resume={saved['checkpoint']}"]
    reply = ranks.run("checkpoint_tasks.go_on", run, size=size, steps=STEPS)

    run_json = same_state(Path(saved["checkpoint"]), Path(reply["checkpoint"]))
    assert run_json["memory"] == {"what": [1, "2"]}
    assert run_json["optimizer_step"] == run_json["schedule_step"] == STEPS
    whole = begun(ranks, "1", extra)["rows"][STEPS:]
    gaps = [abs(a["loss"] / b["loss"] - 1) for a, b in zip(reply["rows"], whole, strict=True)]
    print(f"{source} -> {target}: losses differ by {max(gaps):.1e}")
    assert max(gaps) <= (BF16_LOSS if extra else LATER_LOSS)
    assert [row["lr"] for row in reply["rows"]] == [row["lr"] for row in whole]


@pytest.mark.parametrize("layout", ["TP 2 x PP 2", "PP 2 interleaved", "TP 2 x DP 2"])
def test_what_is_exported_of_any_layout_is_one_model(ranks, layout: str) -> None:
    """The names and shapes of one process's, and values that its weights would have."""
    model = compose([*SMALL, *RECIPE]).model
    exported = []
    for one in ("1", layout):
        weights = CheckpointWeights(Path(begun(ranks, one, [])["checkpoint"]), masters=False)
        exported.append(dict(tensors_of(family_of(model), model, weights)))
    whole, sharded = exported
    assert whole.keys() == sharded.keys()
    for name, tensor in whole.items():
        assert tensor.shape == sharded[name].shape
        # equal initial weights, and two of Adam's steps, each of about lr whatever the gradient
        torch.testing.assert_close(sharded[name], tensor, rtol=0, atol=2e-3, msg=name)
        assert float(tensor.std()) > 5e-3 or "norm" in name


@pytest.mark.parametrize(
    ("layout", "extra"),
    [
        ("1", BF16),
        ("1", []),
        ("DP 2, plain optimizer", BF16),
        ("TP 2 x DP 2", BF16),
        ("TP 2 x PP 2", ["model.tie_embeddings=true", "model.bias=true", "model.qk_norm=true"]),
        ("PP 2 interleaved", [*BF16, "model.normalization=layernorm", "model.position=learned"]),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value) or "fp32",
)
def test_the_memory_that_is_announced_is_what_a_rank_holds(
    ranks, layout: str, extra: list[str]
) -> None:
    size, parallel = LAYOUTS[layout]
    run = [*SMALL, "precision=bf16", *extra, *parallel]
    held = ranks.run("checkpoint_tasks.held", run, size=size)["held"]
    config = compose(run)
    announced = state_bytes(config, check_layout(config, size))
    largest = max(held, key=lambda one: sum(one.values()))
    for part in ("weights", "gradients", "masters", "moments"):
        # buffers are padded, and a distributed optimizer's shards end where its ranks' do
        assert largest[part] == pytest.approx(getattr(announced, part), rel=0.02), part


@pytest.mark.parametrize("layout", ["TP 2 x PP 2", "PP 2 interleaved", "TP 2 x DP 2"])
def test_a_hugging_face_start_is_one_model_on_any_layout(
    ranks, tmp_path: Path, layout: str
) -> None:
    model = compose([*SMALL, *RECIPE]).model
    family = family_of(model)
    single = CheckpointWeights(Path(begun(ranks, "1", [])["checkpoint"]), masters=False)
    given = dict(tensors_of(family, model, single))
    save_file(given, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(family.config))
    size, parallel = LAYOUTS[layout]
    run = [*SMALL, *RECIPE, *parallel, f"init={tmp_path}"]
    reply = ranks.run("checkpoint_tasks.begin_with", run, size=size)
    for masters in (False, True):
        weights = CheckpointWeights(Path(reply["checkpoint"]), masters=masters)
        found = dict(tensors_of(family, model, weights))
        assert all(torch.equal(found[name], tensor) for name, tensor in given.items())


def test_a_megatron_checkpoint_is_one_model_on_any_layout(ranks, tmp_path: Path) -> None:
    """Out of one process, through megatron-core's own modules on one layout, into a run on another."""
    first = Path(begun(ranks, "1", [])["checkpoint"])
    given = CheckpointWeights(first, masters=False)
    run = StoredRun(tmp_path, first, compose([*SMALL, *RECIPE]), STEPS, 0, "", {})
    export_megatron(run, tmp_path / "mc")
    size, parallel = LAYOUTS["TP 2 x PP 2"]
    task = "megatron_model.load_and_save"
    reply = ranks.run(task, [*SMALL, *parallel, f"init={tmp_path}/mc"], size=size)
    size, parallel = LAYOUTS["PP 2 interleaved"]
    run = [*SMALL, *RECIPE, *parallel, f"init={reply['folder']}"]
    reply = ranks.run("checkpoint_tasks.begin_with", run, size=size)
    found = CheckpointWeights(Path(reply["checkpoint"]), masters=False)
    assert found.shapes() == given.shapes()
    assert all(torch.equal(found.whole(key), given.whole(key)) for key in given.shapes())


def test_another_length_and_batch_go_on(ranks) -> None:
    """The position in the data is counted in samples, the schedule in steps: both are kept, and the
    schedule's fractions are those of the new length. Another batch and another decay make another
    experiment: each has to be asked for by name."""
    saved = begun(ranks, "1", [])
    other = ["train.steps=40", "train.global_batch=8", f"resume={saved['checkpoint']}"]
    run = [*SMALL, *RECIPE, *other]
    refusal = ranks.run("checkpoint_tasks.go_on", run, size=1, steps=STEPS)
    cure = "resume_with=[optim.decay,optim.warmup,train.global_batch,train.steps]"
    assert refusal["user_error"].endswith(cure)
    run.append(cure)
    reply = ranks.run("checkpoint_tasks.go_on", run, size=1, steps=STEPS)
    state = json.loads((Path(reply["checkpoint"]) / "run.json").read_text())
    position = (state["step"], state["consumed_samples"], state["schedule_step"])
    assert position == (STEPS, STEPS * 4, STEPS)
    fresh = ranks.run("first_steps", [*SMALL, *RECIPE, *other[:2]], size=1, steps=2 * STEPS)
    assert [row["lr"] for row in reply["rows"]] == [row["lr"] for row in fresh["rows"]][STEPS:]


def test_a_fault_that_one_rank_sees_is_every_ranks(ranks) -> None:
    """Two ranks, the second finds the newest checkpoint wrong: both take the one before it."""
    folder = ranks.run("checkpoint_tasks.two_saves", [*SMALL, *RECIPE], size=2)["folder"]
    run = [*SMALL, *RECIPE, f"resume={folder}"]
    first, second = ranks.run("checkpoint_tasks.fault_in_reading", run, size=2)["heard"]
    assert first == second
    for case in first:
        assert case["loaded"] == "step_00000001", case
        (line,) = case["said"]
        assert "step_00000002 is damaged" in line


def test_a_rank_that_cannot_write_costs_one_checkpoint(ranks) -> None:
    reply = ranks.run(
        "checkpoint_tasks.fault_in_writing", [*SMALL, *RECIPE, "parallel.tensor=2"], size=2
    )
    assert (
        reply["told"] == ["the checkpoint of step 2 was not written: No space left on device"] * 2
    )
    assert reply["left"] == ["latest", "step_00000001"]
    assert reply["latest"] == "step_00000001\n"
