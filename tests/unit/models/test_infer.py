"""A model at work: kept keys and values change nothing, draws follow the distribution, a text's loss is
that of its tokens, and what an evaluation finds is in the run's record."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fp4pretrain.cli import main
from fp4pretrain.config import compose, plan_of
from fp4pretrain.infer import Model, Sampling, generate, load_model, text_loss
from fp4pretrain.infer.sampling import _draw
from fp4pretrain.model.decode import Decoder
from fp4pretrain.parallel import groups
from fp4pretrain.precision import BF16
from fp4pretrain.train.main import train
from fp4pretrain.train.stored import stored_run
from fp4pretrain.train.trainer import unwrapped

FP32 = "optim.params_dtype=fp32"
MODELS = [
    ["model.num_query_groups=2"],
    ["model.qk_norm=true", "model.tie_embeddings=true"],
    ["model.attention_softcap=5"],
    ["model=gpt_345m"],
]
Load = Callable[..., Model]


@pytest.fixture
def load(trained: Any) -> Iterator[Load]:
    """The model of a run that was just made with these overrides."""

    def make(*overrides: str, **options: Any) -> Model:
        _, run = trained(*overrides)
        groups.leave()
        return load_model(stored_run(run), device="cpu", **options)

    yield make


@pytest.fixture
def stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Verbs of this process leave their model's groups, not the process group of other tests."""
    leave = groups.leave
    monkeypatch.setattr(groups, "leave", lambda *, destroy=False: leave())


@pytest.mark.parametrize("model", MODELS, ids=",".join)
def test_one_position_at_a_time_gives_the_logits_of_the_whole(
    load: Load, exactly: Callable[[Any], None], model: list[str]
) -> None:
    """A prompt, single positions, and several at once behind them."""
    loaded = load(*model, FP32)
    exactly(loaded.gpt)
    ids = torch.randint(257, (3, 16), generator=torch.Generator().manual_seed(2))
    whole = loaded.logits(ids)
    decoder = Decoder(loaded.gpt, batch=3, length=16)
    at = 0
    for count in (5, 1, 1, 4, 1, 1, 3):
        at += count
        found = decoder(ids[:, at - count : at])[:, :257]
        torch.testing.assert_close(found, whole[:, at - 1], rtol=1e-4, atol=1e-5)
    assert at == 16


def test_the_loaded_model_is_the_trained_one(trained: Any) -> None:
    trainer, run = trained("precision=nvfp4", "precision.keep.last_blocks=0")
    gpt = unwrapped(trainer.chunks[0]).eval()
    kept = {name: parameter.clone() for name, parameter in gpt.named_parameters()}
    groups.leave()
    loaded = load_model(stored_run(run), device="cpu", precision="recipe")
    found = dict(loaded.gpt.named_parameters())
    assert found.keys() == kept.keys()
    assert all(torch.equal(found[name], parameter) for name, parameter in kept.items())
    linear = loaded.gpt.decoder.layers[1].mlp.linear_fc1
    assert linear.bound.recipe is plan_of(trainer.config).recipe.interned()


def test_two_models_of_one_process_share_their_groups(plain: Path) -> None:
    """A notebook compares two: loading the second changes nothing in what the first computes."""
    ids = torch.arange(8).unsqueeze(0)
    first = load_model(stored_run(plain), device="cpu")
    expected = first.logits(ids)
    second = load_model(stored_run(plain), device="cpu", precision="recipe")
    assert torch.equal(first.logits(ids), expected)
    assert torch.equal(second.logits(ids), expected)


def test_amaxes_of_earlier_steps_come_with_the_weights(small: list[str], tmp_path: Path) -> None:
    """Delayed scaling in a loaded model is the run's: its loss on a text is that of the run's last step."""
    run = tmp_path / "run"
    train(compose([*small, "precision=fp8_delayed", "logging=quiet", f"run_dir={run}"]))
    stored = stored_run(run)
    loaded = load_model(stored, device="cpu", precision="recipe")
    sites = loaded.gpt.decoder.layers[0].mlp.linear_fc1.bound.sites
    assert sites.state() == stored.amaxes and len(stored.amaxes) == 2 * 4 * 6
    loaded.logits(torch.arange(8).unsqueeze(0))
    sites.finish_step(stored.step + 1)
    assert sites.state() == stored.amaxes  # nothing of what was evaluated is remembered


@pytest.mark.parametrize(
    ("options", "quantized"), [({}, False), ({"precision": "recipe"}, True)], ids=str
)
def test_linears_are_bf16_or_as_trained(load: Load, options: Any, quantized: bool) -> None:
    loaded = load("precision=nvfp4", "precision.keep.last_blocks=0", **options)
    recipes = [layer.mlp.linear_fc2.bound.recipe for layer in loaded.gpt.decoder.layers]
    assert [recipe is not BF16 for recipe in recipes] == [quantized] * 2


def test_greedy_text_is_the_likeliest_tokens_and_seeds_replay(load: Load) -> None:
    loaded = load(FP32)
    ids = list(b"ab")
    for _ in range(6):
        ids.append(int(loaded.logits(torch.tensor([ids]))[0, -1].argmax()))
    greedy = generate(loaded, "ab", Sampling(max_tokens=6, temperature=0), samples=2)
    expected = loaded.tokenizer.decode(ids[2:])
    assert greedy == [expected.split("<|endoftext|>")[0]] * 2
    first, second, other = (
        generate(loaded, "ab", Sampling(max_tokens=20, seed=seed), samples=2) for seed in (1, 1, 2)
    )
    assert first == second != other
    assert first[0] != first[1]


def test_draws_follow_the_distribution_and_its_limits() -> None:
    logits = torch.log(torch.tensor([0.5, 0.05, 0.3, 0.15]))
    generator = torch.Generator().manual_seed(0)

    def shares(**how: Any) -> list[float]:
        drawn = _draw(logits.expand(40_000, -1), Sampling(**how), generator)
        return (torch.bincount(drawn, minlength=4) / 40_000).tolist()

    # four standard deviations of a share of 40,000 draws: 0.01
    assert shares() == pytest.approx([0.5, 0.05, 0.3, 0.15], abs=0.01)
    cool = [0.25, 0.0025, 0.09, 0.0225]
    assert shares(temperature=0.5) == pytest.approx([c / sum(cool) for c in cool], abs=0.01)
    assert shares(top_k=2) == pytest.approx([0.625, 0, 0.375, 0], abs=0.01)
    assert shares(top_p=0.6) == pytest.approx([0.625, 0, 0.375, 0], abs=0.01)
    assert shares(top_p=0.49) == [1, 0, 0, 0]
    assert shares(temperature=0) == [1, 0, 0, 0]


def test_a_texts_loss_counts_every_token_once(load: Load) -> None:
    loaded = load(FP32)
    texts = ["a" * 70, "short", "bytes of é and 日"]
    total = count = 0
    for text in texts:
        ids = [256, *text.encode()]
        for at in range(0, len(ids) - 1, 32):  # windows of the model's length
            part = torch.tensor([ids[at : at + 33]])
            logs = loaded.logits(part[:, :-1]).log_softmax(-1)
            total -= float(logs.gather(2, part[:, 1:, None]).sum())
            count += part.shape[1] - 1
    found = text_loss(loaded, texts)
    size = sum(len(text.encode()) for text in texts)
    assert (found.tokens, found.bytes, found.documents) == (count, size, 3)
    assert found.nats == pytest.approx(total, rel=1e-4)
    values = found.values()
    assert values["perplexity"] == pytest.approx(math.exp(found.nats / count))
    # of bytes a token is a byte
    assert values["bits_per_byte"] == pytest.approx(found.loss / math.log(2))


def test_eval_prints_and_records(
    run: Path, stays: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run / "metrics.jsonl"
    rows.write_text('{"event": "train", "step": 9, "tokens": 9, "loss": 1.0}\n')
    (tmp_path / "held.txt").write_text("some text\n" * 20)
    main(["eval", str(run), "--text", str(tmp_path / "held.txt"), "--json", "--device", "cpu"])
    printed = json.loads(capsys.readouterr().out)
    assert set(printed["results"]) == {"text/loss", "text/perplexity", "text/bits_per_byte"}
    first, last = (json.loads(line) for line in rows.read_text().splitlines())
    assert first["step"] == 9
    assert (last["event"], last["step"]) == ("evaluated", 0)
    assert last["eval/text/loss"] == printed["results"]["text/loss"]
    before = rows.read_text()
    more = ["--text", str(tmp_path / "held.txt"), "--no-record", "--device", "cpu"]
    main(["eval", str(run), *more])
    assert re.search(r"^text/loss +\d\.\d{4}$", capsys.readouterr().out, re.MULTILINE)
    assert rows.read_text() == before


def test_generate_prints_the_continuation_alone(
    run: Path, stays: None, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--prompt", "x", "--max-tokens", "5", "--device", "cpu", "--temperature", "0"]
    main(["generate", str(run), *options])
    plain = capsys.readouterr().out
    main(["generate", str(run), *options, "--json", "--samples", "2"])
    told = json.loads(capsys.readouterr().out)
    assert told == {"prompt": "x", "texts": [plain.removesuffix("\n")] * 2}


REFUSED = [
    (
        ["generate", "{run}", "--prompt", "x" * 40],
        r"--prompt: it has 40 tokens and the model takes",
    ),
    (["generate", "{run}", "--prompt", "x", "--top-p", "0"], r"--top-p: 0.0 is out of range"),
    (["generate", "{run}", "--prompt", "x", "--temperature", "nan"], r"--temperature: nan is out"),
    (["generate", "{run}", "--prompt", "x", "--samples", "0"], r"--samples: 0 is out of range"),
    (["generate", "{run}/..", "--prompt", "x"], r".* is no run; give a folder"),
    (["generate", "{run}"], r"the following arguments are required: --prompt"),
    (["eval", "{run}"], r"--text: nothing is to be evaluated"),
    (["eval", "{run}", "--text", "nowhere.txt"], r"inputs: nowhere.txt does not exist"),
    (["eval", "{run}", "--tokenizer", "nowhere.json", "--text", "x"], r"data.tokenizer: nowhere"),
]


@pytest.mark.parametrize(("command", "pattern"), REFUSED)
def test_what_cannot_be_done_is_one_line(
    run: Path,
    stays: None,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    pattern: str,
) -> None:
    before = sorted(run.rglob("*"))
    with pytest.raises(SystemExit) as caught:
        main([word.format(run=run) for word in command])
    told = capsys.readouterr()
    assert (caught.value.code, told.out, told.err.count("\n")) == (2, "", 1)
    assert re.match(f"fp4pretrain: {pattern}", told.err), told.err
    assert sorted(run.rglob("*")) == before
