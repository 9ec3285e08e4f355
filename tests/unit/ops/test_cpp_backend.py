"""precision.backend=cpp: the reference's bits in every cast and every loss, and who casts without it."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from backend_laws import RECIPES, check_operands
from fp4_kernels.cpu import library
from started import losses_alone
from torch import Tensor

from fp4pretrain.bench.linear import casts_of
from fp4pretrain.config import compose, plan_of
from fp4pretrain.errors import UserError
from fp4pretrain.numerics import Noise, QuantSpec, every_spec
from fp4pretrain.ops import Cast, choose, cpp_backend
from fp4pretrain.ops.cpp_backend import CppBackend, same_bits, self_check
from fp4pretrain.ops.reference import EmulatedOperand, ReferenceBackend
from fp4pretrain.precision import Recipe

CPU = torch.device("cpu")
MINE, REFERENCE = CppBackend(), ReferenceBackend()
PARTS = Noise(77, 5, 37, 8, 3, 48, 16)  # a shard in pieces: offsets and gaps that differ by axis
ROOT = Path(__file__).resolve().parents[3]


def _no_compiler() -> str | None:
    try:
        library._compiler()
    except library.Unavailable as error:
        return str(error)
    return None


# Without a compiler there is no library to test. A library that does not compile, load or agree with the
# reference is no reason to skip: the tests below fail.
pytestmark = pytest.mark.skipif(_no_compiler() is not None, reason=str(_no_compiler()))


def drawn(rows: int, cols: int, seed: int = 0) -> Tensor:
    """fp32 [rows, cols], each row of another magnitude."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, cols, generator=g) * torch.exp2(
        torch.randint(-20, 20, (rows, 1), generator=g)
    )


def differs(x: Tensor, *casts: Cast) -> list[str]:
    """The casts of x that are not the reference's, together as a layer asks for them."""
    bad = []
    made, want = (backend.quantize(x, casts) for backend in (MINE, REFERENCE))
    for cast, a, b in zip(casts, made, want, strict=True):
        assert isinstance(a, EmulatedOperand) and isinstance(b, EmulatedOperand)
        assert a.shape == b.shape and a.nbytes == b.nbytes and a.values.dtype == b.values.dtype
        if not (_equal(a.values, b.values) and _equal(a.alpha, b.alpha)):
            bad.append(f"{cast}: {int((a.values != b.values).sum())} of {a.values.numel()}")
    return bad


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return same_bits(a.float(), b.float())


@pytest.mark.parametrize("shape", [(37, 131), (130, 260), (1, 7)])
def test_every_word_of_the_tables_casts_to_the_reference_s_bits(shape: tuple[int, int]) -> None:
    """Rows and columns that no block divides, of FP32, BF16 and FP16, whole, turned, in steps, rotated."""
    sources = [
        drawn(*shape),
        drawn(*shape).bfloat16(),
        torch.randn(*shape, generator=torch.Generator().manual_seed(1)).half(),
        drawn(shape[0], 2 * shape[1])[:, ::2],
        drawn(shape[1], shape[0]).t(),
    ]
    signs = tuple(1 - 2 * (i % 5 == 2) for i in range(32))
    bad = []
    for number, spec in enumerate(s for s in every_spec() if s.quantized):
        size = (0, 16, 32, 128)[number % 4]
        turn: dict[str, Any] = dict(rotation_size=size, multiple=max(16, size))
        turn |= dict(rotated_fp32=number % 3 == 0, signs=signs if size == 32 else None)
        noise = PARTS if spec.stochastic else None
        plain = Cast(spec, noise=noise)
        turned = Cast(spec, transpose=number % 2 == 1, noise=noise, **turn)
        bad += differs(sources[number % len(sources)], plain, turned)
    assert bad == []


ODD = [
    0.0,
    -0.0,
    1e-45,
    -1e-45,
    1e-40,
    -3e-39,
    2.0**-126,
    2.0**-130,
    6.0,
    -5.0,
    2.5,
    0.25,
    3e38,
    -3e38,
]
SPECS = [
    *(QuantSpec("nvfp4", rounding=r) for r in ("nearest", "stochastic", "stochastic_full", "eden")),
    QuantSpec("nvfp4", "2d", scale="four_over_six"),
    QuantSpec("nvfp4_double"),
    QuantSpec("nvfp4_local"),
    QuantSpec("ue5m3"),
    QuantSpec("mxfp6_e2m3", ties="away"),
    *(
        QuantSpec("mxfp4", scale=s)
        for s in ("floor", "ceil", "even", "rceil", "full_grid_adaptive")
    ),
    QuantSpec("fp8_e4m3"),
    QuantSpec("fp8_e5m2", "row", scale="pow2"),
    QuantSpec("fp8_e4m3", "1d"),
]


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_what_is_no_ordinary_number_goes_where_the_reference_sends_it(spec: QuantSpec) -> None:
    """Zeros of both signs, subnormals, the largest numbers, Inf and NaN, in their block and beside it."""
    noise = Noise(3) if spec.stochastic else None
    casts = [
        Cast(spec, noise=noise),
        Cast(spec, transpose=True, multiple=16, rotation_size=16, noise=noise),
    ]
    plain = drawn(48, 64)
    for value in (*ODD, float("inf"), -float("inf"), float("nan")):
        x = plain.clone()
        x[5, 17], x[7, 32:48] = value, value
        assert differs(x, *casts) == [], value
    for scale in (0.0, 2.0**-120, 2.0**-149, 2.0**100):
        assert differs(plain * scale, *casts) == [], scale
        assert differs((plain * scale).bfloat16(), *casts) == [], scale


@pytest.mark.parametrize("shape", [(0, 32), (32, 0)])
def test_matrices_without_elements_are_the_reference_s(shape: tuple[int, int]) -> None:
    casts = [Cast(spec, noise=Noise(3) if spec.stochastic else None) for spec in SPECS]
    assert differs(torch.zeros(shape), *casts) == []


@pytest.mark.parametrize("parallel", ["column", "row"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_shard_draws_the_noise_of_its_place_and_scales_by_the_whole(
    name: str, parallel: str
) -> None:
    assert check_operands(name, (96, 128, 64), parallel=parallel, backend=MINE) == []


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_change_nothing(threads: int) -> None:
    x = drawn(700, 1031)
    spec = QuantSpec("nvfp4", rounding="stochastic")
    casts = [
        Cast(spec, transpose=True, multiple=16, rotation_size=16, noise=PARTS),
        Cast(QuantSpec("nvfp4", "2d")),
        Cast(QuantSpec("nvfp4_local")),
        Cast(QuantSpec("fp8_e4m3", "row")),
    ]
    before = torch.get_num_threads()
    one = MINE.quantize(x, casts)
    try:
        torch.set_num_threads(threads)
        several = MINE.quantize(x, casts)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(one, several, strict=True):
        assert all(_equal(s, t) for s, t in zip(a.tensors(), b.tensors(), strict=True))


def test_x_is_left_as_it_was() -> None:
    x = drawn(64, 64)
    before = x.clone()
    MINE.quantize(x, [Cast(QuantSpec("nvfp4")), Cast(QuantSpec("mxfp4"), transpose=True)])
    assert torch.equal(x, before)


def test_a_cast_that_the_reference_refuses_is_refused_with_its_words() -> None:
    x = drawn(16, 40)
    for cast, error in (
        (Cast(QuantSpec("nvfp4"), rotation_size=16), UserError),
        (Cast(QuantSpec("nvfp4", rounding="stochastic")), ValueError),
    ):
        said = []
        for backend in (MINE, REFERENCE):
            with pytest.raises(error) as refusal:
                backend.quantize(x, [cast])
            said.append(str(refusal.value))
        assert said[0] == said[1]


STEPS = (
    "model.num_layers=2 model.hidden_size=128 model.num_attention_heads=2 model.num_query_groups=2 "
    "model.ffn_hidden_size=128 model.seq_length=64 train.micro_batch=2 train.global_batch=2 "
    "train.steps=40 data.mock=true parallel.device=cpu"
).split()


@pytest.mark.parametrize("recipe", ["nvfp4", "mxfp4_h16", "fp8", "quartet2", "four_over_six"])
def test_losses_of_whole_steps_are_the_reference_s(recipe: str) -> None:
    mine, want = (
        losses_alone([*STEPS, f"precision={recipe}", f"precision.backend={name}"], steps=4)
        for name in ("cpp", "reference")
    )
    assert mine == want and len(set(want)) == 4


# ---- a library that casts otherwise is not trusted


def test_the_self_check_passes() -> None:
    assert self_check() is None


@pytest.mark.parametrize("fault", ["rotation", "signs", "noise", "axes", "rule", "ties"])
def test_the_self_check_sees(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the C++ would do if it dropped a rotation, its signs or the noise, exchanged the noise's axes, or
    took another scale rule or tie."""
    orient, make, noise_of = cpp_backend._oriented, cpp_backend._cast, cpp_backend._noise
    changes: dict[str, dict[str, Any]] = {
        "rotation": dict(rotation_size=0),
        "signs": dict(signs=None),
    }

    def turned(x: Tensor, cast: Cast) -> Any:
        return orient(x, replace(cast, **changes.get(fault, {})))

    def rounded(y: Tensor, cast: Cast, amax: Tensor | None) -> EmulatedOperand:
        spec = cast.spec
        if fault == "rule" and spec.scale in ("ceil", "pow2", "unbiased"):
            spec = replace(spec, scale=spec.row.scale_rules[0])
        if fault == "ties":
            spec = replace(spec, ties="even")
        return make(y, replace(cast, spec=spec), amax)

    def placed(n: Noise) -> Any:
        if fault == "noise":
            n = replace(n, key=0)
        if fault == "axes":
            n = replace(n, row_offset=n.col_offset, col_offset=n.row_offset)
        return noise_of(n)

    monkeypatch.setattr(cpp_backend, "_oriented", turned)
    monkeypatch.setattr(cpp_backend, "_cast", rounded)
    monkeypatch.setattr(cpp_backend, "_noise", placed)
    assert "is not the reference's" in str(self_check())


# ---- the library is made once, by the compiler that is there, and missed in one line


@pytest.fixture
def forgotten() -> Iterator[None]:
    """Nobody has looked for a library yet."""
    found = (cpp_backend.why_missing, cpp_backend._library)
    for function in found:
        function.cache_clear()
    yield
    for function in found:
        function.cache_clear()


def _script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


PLAN = plan_of(compose(["model=tiny", "precision=nvfp4"]))


def test_auto_takes_it_on_a_cpu_and_says_so() -> None:
    chosen, why = choose("auto", PLAN, CPU)
    assert chosen.name == "cpp" and why.endswith("torch matmul, fp32, C++ casts")
    assert choose("cpp", PLAN, CPU)[0].name == "cpp"
    assert "on CPUs, not on cuda" in str(MINE.why_not(PLAN.recipe.fprop, torch.device("cuda")))


@pytest.mark.parametrize("kind", ["absent", "named", "failing", "unwritable", "miscasting"])
def test_without_a_library_the_reference_casts_and_one_line_says_why(
    kind: str, forgotten: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    if kind == "absent":
        monkeypatch.setenv("PATH", str(tmp_path))
        says = "none of g++, clang++, c++ is there: install a C++ compiler, or name one in CXX"
    elif kind == "named":
        monkeypatch.setenv("CXX", "no-such-compiler")
        says = "CXX=no-such-compiler is not there"
    elif kind == "failing":
        script = _script(
            tmp_path / "cc", "#!/bin/sh\necho 'casts.cpp:1: error: no such flag' >&2\nexit 1\n"
        )
        monkeypatch.setenv("CXX", str(script))
        says = "error: no such flag"
    elif kind == "unwritable":
        (tmp_path / "fp4pretrain").write_text("a file in its place")
        says = "cannot be loaded from"
    else:
        monkeypatch.setattr(
            cpp_backend, "self_check", lambda: "its nvfp4 cast is not the reference's"
        )
        monkeypatch.delenv("XDG_CACHE_HOME")
        says = "its nvfp4 cast is not the reference's"
    chosen, why = choose("auto", PLAN, CPU)
    assert chosen.name == "reference" and says in why and "\n" not in why
    with pytest.raises(UserError) as refusal:
        choose("cpp", PLAN, CPU)
    text = str(refusal.value)
    assert (
        text.startswith("precision.backend: cpp cannot run this recipe on cpu (") and says in text
    )
    assert text.count(says) == 1 and text.endswith("use auto") and "\n" not in text
    assert not list(tmp_path.rglob(".writing-*"))


def test_processes_that_start_together_compile_once(tmp_path: Path) -> None:
    """And the next one loads what they made."""
    log = tmp_path / "compiled"
    wrapper = f'#!/bin/sh\necho once >> {log}\nexec {library._compiler()} -O0 "$@"\n'
    script = _script(tmp_path / "cc", wrapper)
    code = (
        "from pathlib import Path\n"
        "from fp4_kernels.cpu import library\n"
        f"print('loaded', library.load(Path({str(tmp_path)!r}) / 'casts')._name)\n"
    )
    environment = os.environ | {"CXX": str(script), "PYTHONPATH": str(ROOT / "kernels")}

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", code]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)

    together = [start(), start()]
    said = [process.communicate()[0] for process in together]
    assert said[0] == said[1] and said[0].startswith("loaded ")
    assert start().communicate()[0] == said[0]
    assert log.read_text() == "once\n"
    assert len(list(tmp_path.rglob("*.so"))) == 1


def test_another_source_is_another_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command = [library._compiler(), *library.FLAGS]
    before = library._identity(command)
    *others, last = library.HEADERS
    changed = tmp_path / last.name
    changed.write_bytes(last.read_bytes() + b"\n")
    monkeypatch.setattr(library, "HEADERS", (*others, changed))
    after = library._identity(command)
    assert before != after and after != library._identity([*command, "-O2"])
    monkeypatch.setattr(library, "_cpu", lambda: "another CPU")
    assert library._identity(command) != after


def test_its_operands_multiply_as_the_reference_s() -> None:
    recipe: Recipe = PLAN.recipe
    casts = casts_of(recipe)
    x, w = drawn(96, 64, seed=3).bfloat16(), drawn(48, 64, seed=4).bfloat16()
    products = []
    for backend in (MINE, REFERENCE):
        (a,), (b,) = (
            backend.quantize(x, [casts["fprop.x"]]),
            backend.quantize(w, [casts["fprop.w"]]),
        )
        products.append(backend.gemm(a, b, out_dtype=torch.float32))
    assert torch.equal(*products)
