"""EleutherAI's lm-eval evaluates our model: its tasks and metrics, on our logits.

Its own tasks fetch their data from Hugging Face; a task in a YAML file of yours may name local files:

    task: mine
    dataset_path: json
    dataset_kwargs: {data_files: {test: mine.jsonl}}
    test_split: test
    output_type: multiple_choice
    doc_to_text: "{{question}}"
    doc_to_choice: choices
    doc_to_target: answer
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fp4pretrain.errors import UserError, first_line
from fp4pretrain.infer.model import Model
from fp4pretrain.infer.sampling import Sampling, generate_ids
from fp4pretrain.infer.text import log_probabilities, windows_of

_BATCH_TOKENS = 8192


def run_tasks(
    model: Model,
    tasks: Sequence[str],
    *,
    folder: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
) -> dict[str, float]:
    """``TASK/METRIC`` -> value, with ``TASK/METRIC_stderr`` where lm-eval gives one.

    Args:
        tasks: names that lm-eval knows, or those of YAML files in ``folder``.
        shots: solved examples before each question; None is the task's own number.
        limit: use only the first so many documents of each task.

    Raises:
        UserError: without lm-eval, for an unknown task, and where a task's data cannot be had.
    """
    try:
        import lm_eval
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise UserError(
            f"--tasks: lm-eval is not here ({error}); pip install 'fp4pretrain[eval]'"
        ) from None
    manager = _manager(TaskManager, tasks, folder)
    try:
        found = lm_eval.simple_evaluate(
            model=_harness_model(model),
            tasks=list(tasks),
            num_fewshot=shots,
            limit=limit,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=0,
        )
    except (OSError, ValueError, ConnectionError) as error:  # what the datasets package raises
        reason = first_line(error)
        raise UserError(
            f"--tasks: {', '.join(tasks)} cannot be run ({reason}); give a task whose data is on this "
            "machine"
        ) from None
    return _flat(found["results"])


def _manager(make: Any, tasks: Sequence[str], folder: Path | None) -> Any:
    """lm-eval's index of tasks: of ``folder`` alone where it has them all, as lm-eval's own takes long."""
    if folder is not None and not folder.is_dir():
        raise UserError(
            f"--task-folder: {folder} is no folder; give one that holds tasks' YAML files"
        )
    path = None if folder is None else str(folder.resolve())
    if path is not None:
        own = make(include_path=path, include_defaults=False)
        if all(own.match_tasks([name]) for name in tasks):
            return own
    manager = make(include_path=path)
    unknown = [name for name in tasks if not manager.match_tasks([name])]
    if unknown or not tasks:
        raise UserError(
            f"--tasks: {''.join(unknown[:1]) or 'nothing'} is no task that lm-eval knows; give its "
            "name, or the folder of its YAML file with --task-folder"
        )
    return manager


def _flat(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """lm-eval says ``acc,none`` for the metric acc without a filter."""
    found = {}
    for task, metrics in results.items():
        for metric, value in metrics.items():
            name = metric.removesuffix(",none").replace(",", "_")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if number and name not in ("alias", "sample_len"):
                found[f"{task}/{name}"] = float(value)
    return found


def _harness_model(model: Model) -> Any:
    from lm_eval.api.model import LM

    class Harness(LM):
        """What lm-eval asks, each request on its own."""

        def loglikelihood(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[tuple[float, bool]]:
            return continuations(model, [request.args for request in requests])

        def loglikelihood_rolling(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[float]:
            return [whole_text(model, request.args[0]) for request in requests]

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
            return [generated(model, *request.args) for request in requests]

    return Harness()


def continuations(model: Model, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
    """For each (context, continuation): ln P(continuation | context), and whether it is the greedy one.

    Context and continuation are tokenized together, as a text is; the context's own tokens decide where
    the continuation begins. What is longer than the model loses its beginning.
    """
    encode = model.tokenizer.encode
    spans = []
    for context, continuation in pairs:
        # spaces at a context's end belong to the next word's token
        stripped = context.rstrip()
        continuation = context[len(stripped) :] + continuation
        before = encode(stripped).tolist() if stripped else []
        whole = encode(stripped + continuation).tolist()
        count = max(1, len(whole) - len(before))
        ids = [model.tokenizer.eod, *whole][-(model.length + 1) :]
        spans.append((ids, min(count, len(ids) - 1)))
    size = max(1, _BATCH_TOKENS // model.length)
    found: list[tuple[float, bool]] = []
    for begin in range(0, len(spans), size):
        part = spans[begin : begin + size]
        found += _scored(model, part)
    return found


def _scored(model: Model, spans: list[tuple[list[int], int]]) -> list[tuple[float, bool]]:
    longest = max(len(ids) for ids, _ in spans)
    end = model.tokenizer.eod
    rows = [ids + [end] * (longest - len(ids)) for ids, _ in spans]
    ids_bs = torch.tensor(rows, device=model.device)
    logs = model.logits(ids_bs[:, :-1]).log_softmax(dim=-1)
    found = []
    for row, (ids, count) in zip(logs, spans, strict=True):
        targets = torch.tensor(ids[-count:], device=model.device)
        part = row[len(ids) - 1 - count : len(ids) - 1]
        total = part.gather(1, targets.unsqueeze(1)).sum()
        found.append((float(total), bool((part.argmax(dim=-1) == targets).all())))
    return found


def whole_text(model: Model, text: str) -> float:
    """ln P of a text, each token from those before it in its window."""
    ids = [model.tokenizer.eod, *model.tokenizer.encode(text).tolist()]
    return sum(
        float(log_probabilities(model, [one]).pop().sum()) for one in windows_of(ids, model.length)
    )


def generated(model: Model, context: str, wanted: dict[str, Any]) -> str:
    """What the model writes after a context (its end, where it is too long), up to the first of the
    strings in ``until``, which is left out."""
    until = wanted.get("until") or []
    until = [until] if isinstance(until, str) else list(until)
    sampling = Sampling(
        max_tokens=int(wanted.get("max_gen_toks", 256)),
        temperature=float(wanted.get("temperature", 0.0)) if wanted.get("do_sample") else 0.0,
    )
    ids = model.tokenizer.encode(context).tolist() or [model.tokenizer.eod]
    room = min(sampling.max_tokens, model.length // 2)
    text = model.tokenizer.decode(generate_ids(model, ids[-(model.length - room) :], sampling)[0])
    for end in until:
        text = text.split(end)[0] if end else text
    return text
