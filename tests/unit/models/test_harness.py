"""lm-eval asks, our model answers: on tasks made here, whose answers are computed a second time."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from fp4pretrain.cli import main
from fp4pretrain.infer import Model, load_model
from fp4pretrain.infer.harness import continuations, generated, run_tasks, whole_text
from fp4pretrain.parallel import groups
from fp4pretrain.train.stored import stored_run

CHOICES = """\
task: colours
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}]
"""
PERPLEXITY = """\
task: prose
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}]
"""
DOCUMENTS: list[dict[str, Any]] = [
    {"question": f"Q{i}: the sky is", "choices": [" red", " blue", " a cat"], "answer": i % 3}
    for i in range(6)
]
TEXTS = ["a text that is longer than the model's window of positions", "another"]


@pytest.fixture
def model(trained: Any) -> Model:
    _, run = trained("optim.params_dtype=fp32")
    groups.leave()
    return load_model(stored_run(run), device="cpu")


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, task, rows in (
        ("colours", CHOICES, DOCUMENTS),
        ("prose", PERPLEXITY, [{"text": text} for text in TEXTS]),
    ):
        file = folder / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / f"{name}.yaml").write_text(task.format(file=file))
    return folder


def test_a_continuations_probability_is_that_of_its_tokens(model: Model) -> None:
    """ln P(ab) = ln P(a) + ln P(b | a), whatever else is scored beside it; spaces move over."""
    context, continuation = "the sky is", " blue"
    both = whole_text(model, context + continuation)
    (first, greedy), _ = continuations(model, [(context, continuation), ("x", "y" * 20)])
    assert first == pytest.approx(both - whole_text(model, context), rel=1e-4)
    assert not greedy
    assert continuations(model, [("the sky is ", "blue")])[0][0] == pytest.approx(first, rel=1e-4)


def test_a_continuation_is_greedy_where_every_token_is_the_likeliest(model: Model) -> None:
    characters = [chr(code) for code in range(33, 127)]
    for context in "abcdefgh":
        ids = torch.tensor([[256, ord(context)]])
        best = int(model.logits(ids)[0, -1].argmax())
        found = continuations(model, [(context, one) for one in characters])
        greedy = {one for one, (_, flag) in zip(characters, found, strict=True) if flag}
        assert greedy == ({chr(best)} & set(characters))


def test_writing_stops_before_the_first_of_the_strings(model: Model) -> None:
    text = generated(model, "the sky is", {"until": [], "max_gen_toks": 8})
    assert len(text) > 2
    stopped = generated(model, "the sky is", {"until": ["zzz", text[2]], "max_gen_toks": 8})
    assert stopped == text[: text.index(text[2])]
    assert generated(model, "long " * 50, {"until": "z" * 9, "max_gen_toks": 4})


def test_tasks_of_local_files(model: Model, tasks: Path) -> None:
    pytest.importorskip("lm_eval")
    found = run_tasks(model, ["colours", "prose"], folder=tasks)
    right = 0
    for row in DOCUMENTS:
        pairs = [(row["question"], choice) for choice in row["choices"]]
        scores = [score for score, _ in continuations(model, pairs)]
        right += scores.index(max(scores)) == row["answer"]
    assert found["colours/acc"] == pytest.approx(right / len(DOCUMENTS))
    nats = -sum(whole_text(model, text) for text in TEXTS)
    size = sum(len(text.encode()) for text in TEXTS)
    assert found["prose/bits_per_byte"] == pytest.approx(nats / size / 0.6931471805599453)


def test_the_verb_records_and_refuses(
    run: Path,
    tasks: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("lm_eval")
    leave = groups.leave
    monkeypatch.setattr(groups, "leave", lambda *, destroy=False: leave())
    common = ["eval", str(run), "--device", "cpu", "--task-folder", str(tasks), "--json"]
    main([*common, "--tasks", "colours", "--limit", "3"])
    printed = json.loads(capsys.readouterr().out)["results"]
    row = json.loads((run / "metrics.jsonl").read_text())
    assert row["eval/colours/acc"] == printed["colours/acc"]
    (tasks / "colours.jsonl").unlink()
    before = (run / "metrics.jsonl").read_text()
    for names, pattern in (
        ("colour", r"--tasks: colour is no task that lm-eval knows"),
        ("colours", r"--tasks: colours cannot be run \("),
    ):
        with pytest.raises(SystemExit):
            main([*common, "--tasks", names])
        told = capsys.readouterr()
        lines = [line for line in told.err.splitlines() if line.startswith("fp4pretrain: ")]
        assert re.match(f"fp4pretrain: {pattern}", lines[-1])
        assert told.out == ""
    assert (run / "metrics.jsonl").read_text() == before
