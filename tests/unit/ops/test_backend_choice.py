"""Who computes: the choice is said, a named backend that cannot raises, and amaxes are reduced."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fp4pretrain.errors import UserError
from fp4pretrain.numerics import QuantSpec
from fp4pretrain.ops import Cast, backend, cast_operands, choice, choose
from fp4pretrain.ops.cpp_backend import why_missing
from fp4pretrain.ops.reference import ReferenceBackend
from fp4pretrain.precision import Dgrad, Fprop, Gemm, Plan, Recipe, Rotation, Wgrad
from fp4pretrain.presets import groups

CPU = torch.device("cpu")
NV, MX, E4M3 = QuantSpec("nvfp4"), QuantSpec("mxfp4"), QuantSpec("fp8_e4m3")
PLAN = Plan(Recipe(Fprop(NV, NV), Dgrad(NV, NV), Wgrad(NV, NV)), 4)


class Picky(ReferenceBackend):
    """Runs forward GEMMs only."""

    name = "picky"

    def why_not(self, gemm: Gemm, device: torch.device) -> str | None:
        return None if isinstance(gemm, Fprop) else "its kernels are not written"


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        choice,
        "available",
        lambda **_: {"picky": Picky(), "reference": ReferenceBackend()},
    )


def test_the_reference_is_there_last_and_runs_everything() -> None:
    found = choice.available()
    assert list(found)[-1] == "reference"
    assert all(name == b.name for name, b in found.items())
    assert choice.refusals(found["reference"], PLAN.recipes(), CPU) == []


def test_a_named_backend_is_taken_and_said() -> None:
    chosen, why = choose("reference", PLAN, CPU)
    assert isinstance(chosen, ReferenceBackend)
    assert why == "backend reference (asked for): torch matmul, fp32"


def test_auto_takes_the_first_that_can_and_says_whom_it_passed_over(two: None) -> None:
    chosen, why = choose("auto", PLAN, CPU)
    assert chosen.name == "reference"
    assert why == (
        "backend reference (auto; not picky (dgrad: its kernels are not written)): torch matmul, fp32"
    )


def test_a_named_backend_that_cannot_run_raises_and_says_all_reasons(two: None) -> None:
    with pytest.raises(UserError) as refusal:
        choose("picky", PLAN, CPU)
    text = str(refusal.value)
    assert text.startswith("precision.backend: picky cannot run this recipe on cpu")
    assert "dgrad: its kernels" in text and "wgrad: its kernels" in text and "fprop" not in text
    assert text.endswith("use auto") and "\n" not in text


def test_an_unknown_backend_raises_and_lists_those_that_are_here(two: None) -> None:
    with pytest.raises(UserError, match=r"^precision\.backend: 'abacus' .*auto, picky, reference$"):
        choose("abacus", PLAN, CPU)


def test_no_backend_at_all_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "available", lambda **_: {"picky": Picky()})
    with pytest.raises(UserError, match=r"^precision\.backend: none can run .*picky"):
        choose("auto", PLAN, CPU)


class OneRank:
    def size(self) -> int:
        return 1


class TwoRanks(OneRank):
    def size(self) -> int:
        return 2


@pytest.fixture
def reductions(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """A fake all-reduce: the other rank has 100 everywhere. Lists what this rank gave."""
    given: list[torch.Tensor] = []

    def all_reduce(tensor: torch.Tensor, op: Any, group: Any) -> None:
        assert op == torch.distributed.ReduceOp.MAX
        given.append(tensor.clone())
        tensor.clamp_(min=100.0)

    monkeypatch.setattr(backend.dist, "all_reduce", all_reduce)
    return given


def test_tensor_amaxes_are_reduced_in_one_call_in_the_order_of_the_casts(
    reductions: list[torch.Tensor],
) -> None:
    """Rotated copies give the amax after the rotation; block-scaled formats give none."""
    x = torch.zeros(32, 32, dtype=torch.bfloat16)
    x[0, 0] = 8.0  # H16 spreads it: 8 / sqrt(16) = 2
    casts = [
        Cast(NV, shared=True),
        Cast(MX, shared=True),
        Cast(E4M3, transpose=True, rotation_size=16, shared=True),
        Cast(QuantSpec(), shared=True),
        Cast(NV),  # another tensor's scale: this rank's own
        Cast(QuantSpec("fp8_e4m3", "row"), shared=True),
    ]
    operands = cast_operands(ReferenceBackend(), x, casts, amax_group=TwoRanks())
    (given,) = reductions
    assert given.tolist() == [8.0, 2.0, 8.0, *[0.0] * 31]
    assert operands[4].alpha == torch.tensor(8.0) / torch.tensor(2688.0)
    assert (operands[5].alpha == 1 / (torch.tensor(448.0) / torch.tensor(100.0))).all()
    assert operands[0].alpha == torch.tensor(100.0) / torch.tensor(2688.0)
    assert operands[2].alpha == 1 / (torch.tensor(448.0) / torch.tensor(100.0))
    assert operands[1].alpha == 1.0


@pytest.mark.parametrize(
    "casts, group",
    [
        ([Cast(NV, shared=True)], OneRank()),
        ([Cast(NV, shared=True)], None),
        ([Cast(NV)], TwoRanks()),
        ([Cast(MX, shared=True), Cast(QuantSpec(), shared=True)], TwoRanks()),
    ],
)
def test_nothing_is_reduced_where_nothing_is_shared(
    casts: list[Cast], group: Any, reductions: list[torch.Tensor]
) -> None:
    x = torch.randn(32, 32).bfloat16()
    cast_operands(ReferenceBackend(), x, casts, amax_group=group)
    assert reductions == []


@pytest.mark.parametrize("spec", [NV, MX, E4M3, QuantSpec(), QuantSpec("fp8_e5m2", block="row")])
@pytest.mark.parametrize("rotation", [Rotation(), Rotation("hadamard", 16)])
def test_a_gemm_is_a_bt_and_may_be_added_to_what_is_there(
    spec: QuantSpec, rotation: Rotation
) -> None:
    reference = ReferenceBackend()
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(n, 64, generator=generator).bfloat16() for n in (48, 32))
    size = rotation.size if rotation.active else 0
    # b comes as its transpose: the contraction axis is then the tensor's first
    (qa,) = reference.quantize(a, [Cast(spec, rotation_size=size)])
    (qb,) = reference.quantize(b.t(), [Cast(spec, transpose=True, rotation_size=size)])
    assert qa.shape == (48, 64) and qb.shape == (32, 64)
    out = reference.gemm(qa, qb, out_dtype=torch.float32)
    exact = a.double() @ b.double().t()
    assert float((out - exact).norm() / exact.norm()) < 0.25  # its rotation cancels
    total = torch.ones(48, 32)
    added = reference.gemm(qa, qb, out_dtype=torch.float32, accumulate_into=total)
    assert added is total
    assert torch.equal(total, 1 + out)
    assert torch.equal(reference.gemm(qa, qb, out_dtype=torch.bfloat16), out.bfloat16())


@pytest.mark.parametrize(
    ("package", "reason"),
    [
        (None, "Triton is not installed"),
        ("raise OSError('libcuda.so: cannot open')\n", "cannot be imported: libcuda.so: cannot"),
    ],
)
def test_what_needs_no_triton_runs_without_it(
    tmp_path: Path, package: str | None, reason: str
) -> None:
    """`auto` on a CPU, doctor's table, and a named backend's line, in a process that cannot import it; nor
    what draws a report, which no run needs. And megatron-core comes without what takes long to load."""
    lean = (
        "assert torch.compile.__module__ == 'torch' and 'torch._inductor.compile_fx' not in sys.modules\n"
        "assert 'wandb' not in sys.modules\n"
    )
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(package or "")
    code = (
        "import sys\n"
        "sys.modules['plotly'] = sys.modules['matplotlib'] = None\n"
        + ("sys.modules['triton'] = None\n" if package is None else "")
        + "import torch\n"
        "from fp4pretrain import cli\n"
        "from fp4pretrain.config import compose, plan_of\n"
        "from fp4pretrain.ops import choose\n"
        "print(choose('auto', plan_of(compose([])), torch.device('cpu'))[1])\n"
        + ("cli.main(['doctor'])\n" if package is None else "")  # it composes every recipe
        + "import fp4pretrain.train.main\n"
        + (lean if package else "")
        + "choose('triton', plan_of(compose([])), torch.device('cpu'))\n"
    )
    root = Path(__file__).resolve().parents[3]
    paths = os.pathsep.join([str(tmp_path), str(root), str(root / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": paths, "COLUMNS": "300"},
        capture_output=True,
        text=True,
        check=False,
    )
    chosen, *table = done.stdout.splitlines()
    here = "reference" if why_missing() else "cpp"
    assert chosen.startswith(f"backend {here} (auto; not native ("), done.stderr
    assert reason in chosen
    assert sum(reason in line for line in table) == (6 if package is None else 0)
    # a line for each recipe, and one for each GEMM of the one that was asked about
    rows = len(groups()["precision"]) + 3 if package is None else 0
    assert sum(f" {here} " in line for line in table) == rows
    assert "precision.backend: triton needs Triton (" in done.stderr.splitlines()[-1]
    assert reason in done.stderr
