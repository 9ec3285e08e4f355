"""Each layout against one GPU: losses and gradients; checkpoints that change their layout and come back."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from lab import Lab, Results, Task, agreement, grid, records

RECIPES = ("bf16", "fp8", "nvfp4", "mxfp4_h16")
# deterministic: attention's gradient in FP32 adds in any order, and a moved BF16 code moves others
RUN = [*grid.MODEL, "optim.params_dtype=fp32", "train.deterministic=true"]
# the three-dimensional layout of as many ranks, or what comes nearest to one
MIXED = {2: "TP 2 + SP", 4: "TP 2 x PP 2", 8: "TP 2 x PP 2 x DP 2 + SP"}


def agree(lab: Lab, results: Results, *, recipes: list[str], layouts: list[str]) -> None:
    """First and later losses and the first gradient of every layout and recipe, against one GPU's."""
    wanted = {
        layout: [r for r in recipes if results.lacks(f"{layout}, {r}")]
        for layout in sorted(layouts, key=lambda name: -grid.LAYOUTS[name].ranks)
    }
    tasks = [
        Task(
            layout,
            "each_recipe",
            [*RUN, f"precision={','.join(left)}", *grid.LAYOUTS[layout].overrides],
            size=grid.LAYOUTS[layout].ranks,
            steps=agreement.STEPS,
        )
        for layout, left in wanted.items()
        if left
    ]
    if not tasks:
        return
    alone = _alone(lab, sorted({recipe for left in wanted.values() for recipe in left}))
    for task, reply in lab.run(tasks):
        for recipe in wanted[task.key]:
            row = {"layout": task.key, "recipe": recipe, "seconds": reply["seconds"]}
            if "failed" in reply:
                row["failed"] = reply["failed"]
            elif "failed" in alone[recipe]:
                row["failed"] = f"one GPU: {alone[recipe]['failed']}"
            else:
                mine = {"rows": reply["recipes"][recipe], "out": reply["out"] / recipe}
                row |= _compared(mine, alone, layout=task.key, recipe=recipe)
            results.add(f"{task.key}, {recipe}", row)


def _compared(
    reply: dict[str, Any], alone: dict[str, dict[str, Any]], *, layout: str, recipe: str
) -> dict[str, Any]:
    found = agreement.difference(reply, alone[recipe])
    allowing = _allowed(alone, layout, recipe)
    return {
        **asdict(found),
        "agrees": found.within(allowing),
        "allowed": asdict(allowing),
        "losses": agreement.losses(reply),
        "losses_alone": agreement.losses(alone[recipe]),
    }


def _alone(lab: Lab, recipes: list[str]) -> dict[str, dict[str, Any]]:
    """One GPU's replies by recipe, and of its controls: weights nudged, FP8 with FP32 sums."""
    tasks = [
        Task(r, "first_steps", [*RUN, f"precision={r}"], steps=agreement.STEPS) for r in recipes
    ]
    tasks += [Task(f"{r} nudged", "nudged_steps", [*RUN, f"precision={r}"]) for r in recipes]
    if "fp8" in recipes:
        reference = [*RUN, "precision=fp8", "precision.backend=reference"]
        tasks.append(Task("fp8 fp32 sums", "first_steps", reference, steps=agreement.STEPS))
    late = {task.key: {"failed": "the time was over"} for task in tasks}
    return late | {task.key: reply for task, reply in lab.run(tasks)}


def _allowed(alone: dict[str, dict[str, Any]], layout: str, recipe: str) -> agreement.Difference:
    splits_sums = grid.LAYOUTS[layout].splits_sums
    allowing = agreement.allowed(recipe, splits_sums=splits_sums)
    if splits_sums:
        allowing = replace(allowing, first=agreement.DEEP_LOSS)
    if splits_sums and "failed" not in alone[f"{recipe} nudged"]:
        nudged = agreement.gradient_error(alone[f"{recipe} nudged"], alone[recipe])
        allowing = replace(allowing, gradient=max(allowing.gradient, nudged))
    if splits_sums and recipe == "fp8" and "failed" not in alone["fp8 fp32 sums"]:
        sums = agreement.other_sums(alone["fp8"], alone["fp8 fp32 sums"])
        allowing = replace(
            allowing,
            first=max(allowing.first, sums.first),
            gradient=max(allowing.gradient, sums.gradient),
        )
    return allowing


def reshard(lab: Lab, results: Results) -> None:
    """A checkpoint of all ranks on one GPU and on TP 4 and back: every tensor's bits at each stop."""
    around = ["1 GPU", *(["TP 4"] if lab.gpus >= 4 else [])]
    everyone = {4: ["DP 4", "PP 4 interleaved"], 8: ["DP 8"]}.get(lab.gpus, [])
    for source in (MIXED[lab.gpus], *everyone):
        trips = [other for other in around if results.lacks(f"{source} to {other} and back")]
        if trips:
            _trips(lab, results, source=source, trips=trips)


def _trips(lab: Lab, results: Results, *, source: str, trips: list[str]) -> None:
    run = [*grid.MODEL, "precision=nvfp4"]

    def task(key: str, layout: str, checkpoint: str | None) -> Task:
        one = grid.LAYOUTS[layout]
        job = "checkpoint_tasks.begin" if checkpoint is None else "checkpoint_tasks.go_on"
        resume = [] if checkpoint is None else [f"resume={checkpoint}"]
        return Task(key, job, [*run, *one.overrides, *resume], size=one.ranks, steps=2)

    for _, saved in lab.run([task(source, source, None)]):
        for trip in trips:
            key = f"{source} to {trip} and back"
            there = _reply(lab, task(key, trip, saved.get("checkpoint", "")), saved)
            back = _reply(lab, task(key, source, there.get("checkpoint", "")), there)
            if back.get("failed") == "the time was over":
                return
            if "failed" in back:
                results.add(key, back)
                continue
            row = {"there": _same(saved, there), "back": _same(saved, back)}
            after = (saved["rows"][-1]["loss"], there["rows"][-1]["loss"], back["rows"][-1]["loss"])
            row["losses_two_steps_later"] = list(after)
            results.add(key, row | {"seconds": there["seconds"] + back["seconds"]})


def _reply(lab: Lab, task: Task, before: dict[str, Any]) -> dict[str, Any]:
    if "failed" in before:
        return before
    for _, reply in lab.run([task]):
        return reply
    return {"failed": "the time was over"}


def _same(saved: dict[str, Any], reply: dict[str, Any]) -> bool:
    try:
        records.same_state(Path(saved["checkpoint"]), Path(reply["checkpoint"]))
    except AssertionError:
        return False
    return True
