"""The GPT that a run config builds: sizes, first loss, who follows the plan, tied gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from fp4pretrain.config import compose, plan_of
from fp4pretrain.model import build_model, model_config
from fp4pretrain.model.build import GPT, PlanBinding, padded_vocab
from fp4pretrain.nn.clock import Clock
from fp4pretrain.ops.reference import ReferenceBackend
from fp4pretrain.precision import BF16, Progress

SMALL = [
    "model=tiny",
    "model.num_layers=2",
    "model.hidden_size=128",
    "model.ffn_hidden_size=256",
    "model.seq_length=128",
    "model.num_attention_heads=2",
    "model.num_query_groups=1",
]
LLAMA: list[str] = []
GPT2 = [
    "model.activation=gelu",
    "model.normalization=layernorm",
    "model.position=learned",
    "model.tie_embeddings=true",
    "model.bias=true",
    "model.num_query_groups=2",
]
RELU2 = ["model.activation=squared_relu", "model.kv_channels=128"]


def build(*overrides: str) -> tuple[GPT, PlanBinding, Any]:
    config = compose([*SMALL, *overrides])
    (chunk,), binding = build_model(
        config,
        plan_of(config),
        backend=ReferenceBackend(),
        clock=Clock(config.seed),
        transformer=model_config(config),
    )
    if config.optim.params_dtype == "bf16":
        chunk.bfloat16()  # what megatron-core's Float16Module does in training
    return chunk, binding, config


def loss_of(gpt: Any, config: Any, *, batch: int = 2) -> torch.Tensor:
    """The mean loss of random tokens."""
    generator = torch.Generator().manual_seed(3)
    shape = (batch, config.model.seq_length + 1)
    text = torch.randint(config.model.vocab_size, shape, generator=generator)
    text = text.to(torch.cuda.current_device())
    position = torch.arange(shape[1] - 1, device=text.device).expand(batch, -1)
    return gpt(text[:, :-1], position, attention_mask=None, labels=text[:, 1:]).float().mean()


def expected_parameters(m: Any) -> int:
    head = m.kv_channels or m.hidden_size // m.num_attention_heads
    groups = m.num_query_groups or m.num_attention_heads
    gate = 2 if m.activation == "swiglu" else 1
    linears = [
        (m.hidden_size, (m.num_attention_heads + 2 * groups) * head),
        (m.num_attention_heads * head, m.hidden_size),
        (m.hidden_size, gate * m.ffn_hidden_size),
        (m.ffn_hidden_size, m.hidden_size),
    ]
    norm = m.hidden_size * (2 if m.normalization == "layernorm" else 1)
    block = sum(k * n + (n if m.bias else 0) for k, n in linears) + 2 * norm
    matrix = padded_vocab(m.vocab_size, 1) * m.hidden_size
    positions = m.seq_length * m.hidden_size if m.position == "learned" else 0
    return m.num_layers * block + norm + matrix * (1 if m.tie_embeddings else 2) + positions


@pytest.mark.parametrize("kind", [LLAMA, GPT2, RELU2])
def test_size_and_first_loss(kind: list[str]) -> None:
    """Untrained, all padded tokens are nearly equally likely: ln(V), and half the logits' variance.

    Normed features times N(0, .02) over 128 features: variance .05 (squared features sum to 128).
    """
    gpt, _, config = build(*kind)
    assert sum(p.numel() for p in gpt.parameters()) == expected_parameters(config.model)
    loss = float(loss_of(gpt, config))
    variance = config.model.hidden_size * config.model.init_std**2
    expected = math.log(padded_vocab(config.model.vocab_size, 1)) + variance / 2
    assert loss == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("preset, millions", [("tiny", 2.9), ("gpt_30m", None)])
def test_a_preset_has_the_parameters_of_its_sizes(preset: str, millions: float | None) -> None:
    config = compose([f"model={preset}"])
    (gpt,), _ = build_model(
        config,
        plan_of(config),
        backend=ReferenceBackend(),
        clock=Clock(0),
        transformer=model_config(config),
    )
    count = sum(p.numel() for p in gpt.parameters())
    assert count == expected_parameters(config.model)
    if millions:
        assert count / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize("recipe", ["fp8", "nvfp4", "mxfp4_rht_sr", "mxfp4_h16"])
def test_every_recipe_trains_the_same_model_from_the_same_loss(recipe: str) -> None:
    plain, _, _ = build()
    gpt, _, config = build(f"precision={recipe}", "precision.keep.last_blocks=0")
    ours, theirs = dict(gpt.named_parameters()), dict(plain.named_parameters())
    assert all(torch.equal(ours[n], p) for n, p in theirs.items())
    loss = loss_of(gpt, config)
    loss.backward()
    assert float(loss) == pytest.approx(float(loss_of(plain, config)), abs=0.02)
    for name, p in ours.items():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name


def test_a_part_of_the_projections_is_the_rows_that_attention_takes_for_it() -> None:
    """Keys in MXFP4, all else in BF16: megatron-core's own split finds other keys and nothing else."""
    sizes = ["model.num_attention_heads=4", "model.num_query_groups=2"]
    k_alone = ["precision.rules.k.recipe=mxfp4_plain", "precision.rules.k.linears=[k]"]
    plain, mixed = (build("precision=bf16", *sizes, *rule)[0] for rule in ([], k_alone))
    x = torch.randn(16, 2, 128, device=torch.cuda.current_device()).bfloat16()
    q, k, v = plain.decoder.layers[0].self_attention.get_query_key_value_tensors(x)
    found = mixed.decoder.layers[0].self_attention.get_query_key_value_tensors(x)
    assert torch.equal(found[0], q) and torch.equal(found[2], v)
    assert (found[1] != k).float().mean() > 0.9


def test_each_linear_follows_the_plan_and_the_head_only_where_a_rule_says_so() -> None:
    gpt, binding, config = build(
        "precision=nvfp4",
        "precision.keep.first_blocks=1",
        "precision.keep.last_blocks=0",
        "precision.tail.at=0.5",
        "precision.rules.head.recipe=fp8",
        "precision.rules.head.linears=[head]",
        "precision.rules.head.start=0.9",
    )
    plan = plan_of(config)
    names = [(layer, name) for layer, name, _ in binding.linears]
    assert names == list(plan.linears())
    places = {(x.bound.layer, x.bound.linear) for _, _, x in binding.linears}
    assert len(places) == 9  # so no two share noise
    late = plan.recipe.replaced(("fprop",), BF16)
    fp8 = plan_of(compose(["precision=fp8"])).recipe
    steps = ((0, False, plan.recipe), (4, False, plan.recipe), (5, True, late), (8, False, late),
             (9, True, late), (4, True, plan.recipe))  # fmt: skip
    for step, changed, recipe in steps:
        assert binding.apply(Progress(step, 10)) == changed
        head = fp8 if step == 9 else BF16
        assert binding.recipes() == [BF16] * 4 + [recipe] * 4 + [head]
        assert gpt.output_layer.bound.recipe == head


def gradients(*overrides: str, ddp: bool) -> dict[str, torch.Tensor]:
    """Each parameter's gradient of one microbatch: autograd's, or DDP's FP32 main gradient."""
    gpt, _, config = build("optim.params_dtype=fp32", *overrides)
    wrapped: Any = gpt
    if ddp:
        wrapped = DistributedDataParallel(
            model_config(config),
            DistributedDataParallelConfig(grad_reduce_in_fp32=True),
            gpt,
        )
        wrapped.zero_grad_buffer()
    loss_of(wrapped, config).backward()
    named = gpt.named_parameters()
    return {name: (p.main_grad if ddp else p.grad).clone() for name, p in named}


@pytest.mark.parametrize("tied", ["true", "false"])
def test_main_gradients_are_autograds(tied: str) -> None:
    """A tied embedding gets two gradients: the head's, added by our GEMM, and its own."""
    plain = gradients(f"model.tie_embeddings={tied}", ddp=False)
    main = gradients(f"model.tie_embeddings={tied}", ddp=True)
    assert plain.keys() == main.keys()
    for name, expected in plain.items():
        error = float((main[name] - expected).norm() / expected.norm())
        assert error < 1e-6, (name, error)


def test_qk_norm_normalizes_every_head_of_queries_and_keys() -> None:
    """Whatever the size of the projection's weights, a head's query has the norm's length."""
    gpt, _, config = build("model.qk_norm=true", "optim.params_dtype=fp32")
    names = [name for name, _ in gpt.named_parameters() if "_layernorm" in name and "self" in name]
    assert [name.split(".")[-2] for name in names] == ["q_layernorm", "k_layernorm"] * 2
    seen: list[torch.Tensor] = []
    attention = gpt.decoder.layers[0].self_attention
    attention.core_attention.register_forward_pre_hook(
        lambda module, inputs: seen.extend(one.detach() for one in inputs[:2])
    )
    before = loss_of(gpt, config)
    with torch.no_grad():
        head = config.model.hidden_size // config.model.num_attention_heads
        values = attention.linear_qkv.weight.view(-1, head, config.model.hidden_size)
        values[:-1] *= 100.0  # queries and keys; the last head of a group is its value
    after = loss_of(gpt, config)
    for one in seen:  # rotated pairs keep their length
        length = one.double().square().mean(-1)
        # eps beside the mean square of what is normalized, before the weights grew
        assert torch.allclose(length, torch.ones_like(length), atol=0.02)
    assert float(after) == pytest.approx(float(before), rel=1e-3)
    plain, _, _ = build("optim.params_dtype=fp32")
    assert not any("q_layernorm" in name for name, _ in plain.named_parameters())


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_z_loss_moves_the_gradient_by_its_closed_form_and_no_loss(dtype: str) -> None:
    """d/dlogits of c log(Z)^2 is 2 c log(Z) softmax; what is returned stays the cross entropy."""
    generator = torch.Generator().manual_seed(1)
    vocabulary, coefficient = padded_vocab(257, 1), 0.05
    kind = torch.bfloat16 if dtype == "bf16" else torch.float32
    device = torch.cuda.current_device()
    logits = (3 * torch.randn(16, 2, vocabulary, generator=generator)).to(kind).to(device)
    labels = torch.randint(257, (2, 16), generator=generator).to(device)
    found = []
    for value in (0.0, coefficient):
        gpt, _, _ = build(f"model.z_loss={value}", f"optim.params_dtype={dtype}")
        leaf = logits.clone().requires_grad_()
        loss = gpt.compute_language_model_loss(labels, leaf * 1)  # which may work in place
        (grad,) = torch.autograd.grad(loss.float().sum(), leaf)
        found.append((loss.detach().double(), grad.double()))
        gpt.eval()
        assert torch.equal(
            gpt.compute_language_model_loss(labels, logits.clone()).double(), found[0][0]
        )
    exact = logits.double()
    z = exact.logsumexp(-1, keepdim=True)
    expected = 2 * coefficient * z * exact.softmax(-1)
    assert torch.equal(found[0][0], found[1][0])
    difference = found[1][1] - found[0][1]
    tolerance = 1e-2 if dtype == "bf16" else 1e-5
    assert float((difference - expected).norm() / expected.norm()) < tolerance


def test_soft_capped_scores_reach_the_model() -> None:
    gpt, _, config = build("model.attention_softcap=50", "optim.params_dtype=fp32")
    assert gpt.decoder.layers[1].self_attention.core_attention.softcap == 50
    high = float(loss_of(gpt, config))
    plain, _, _ = build("optim.params_dtype=fp32")
    assert high == pytest.approx(float(loss_of(plain, config)), rel=1e-4)  # scores are far below 50
    tight, _, _ = build("model.attention_softcap=1e-3", "optim.params_dtype=fp32")
    assert abs(float(loss_of(tight, config)) - high) > 1e-4
