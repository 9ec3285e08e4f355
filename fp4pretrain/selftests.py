"""What ``fp4pretrain doctor`` tries on this machine: each test is one line, with its cure where it fails.

They ask what a run relies on and cannot see: that stochastic rounding has no bias, is no constant and
replays; that rotations are orthogonal and cancel in a GEMM; that ranks find each other and how fast they
talk; that there is room for checkpoints; where wandb would log to, and whether TensorBoard is here.
"""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from fp4pretrain.errors import first_line
from fp4pretrain.numerics import hadamard_matrix
from fp4pretrain.observe.tensorboard_sink import INSTALL
from fp4pretrain.observe.wandb_sink import where_to
from fp4pretrain.ops import Backend, Cast, Moment, Shard, linear_casts
from fp4pretrain.ops.reference import oriented
from fp4pretrain.precision import GEMMS, OPERANDS, Recipe

_ROWS = 256  # a multiple of every block and rotation
_DRAWS = 64
_ROOM_GIB = 5.0
_MIB = 16
_REPORT = "use precision.backend=reference, and report it with the versions above"


@dataclass(frozen=True)
class Outcome:
    """``good``, and what was found; ``cure`` where it is not good."""

    name: str
    good: bool
    found: str
    cure: str = ""


def self_tests(backend: Backend, recipe: Recipe, device: torch.device) -> list[Outcome]:
    """All tests, of the recipe's casts on the backend that would take it. Collective where several
    ranks have joined. A test that raises is a bad outcome, and the others go on."""
    tests: dict[str, Callable[[], Outcome]] = {
        "stochastic rounding": lambda: stochastic_rounding(backend, recipe, device),
        "rotation": lambda: rotation(backend, recipe, device),
        "collectives": lambda: collectives(device),
        "disk": lambda: disk(Path.cwd()),
        "wandb": wandb,
        "tensorboard": tensorboard,
    }
    found = []
    for name, test in tests.items():
        try:
            found.append(test())
        except Exception as error:  # whatever a machine does
            text = first_line(error)
            found.append(Outcome(name, False, text, "report it with the versions above"))
    return found


def stochastic_rounding(backend: Backend, recipe: Recipe, device: torch.device) -> Outcome:
    """Every stochastic cast of the recipe: two keys differ, one key replays bit for bit, and the mean of
    64 draws is nearer to x than one draw by at least 6.4 times, four fifths of the square root of 64."""
    name = "stochastic rounding"
    x = _noise(device)
    told = []
    for where, cast in _casts(recipe).items():
        if cast.noise is None:
            continue
        draws = [_drawn(backend, x, cast, key) for key in range(_DRAWS)]
        if torch.equal(draws[0], draws[1]):
            return Outcome(name, False, f"{where}: two keys round alike", _REPORT)
        if not torch.equal(draws[0], _drawn(backend, x, cast, 0)):
            return Outcome(name, False, f"{where}: one key rounds in two ways", _REPORT)
        if cast.spec.rounding_row.scales:  # unbiased over rotations, of which these draws have one
            told.append(f"{where} not asked: its bias averages out over rotations")
            continue
        drawn = torch.stack(draws)
        moves = (drawn != drawn[0]).any(dim=0)  # the others lie on the grid, or are clipped
        errors = (drawn - oriented(x, cast).float())[:, moves]
        gained = float(errors.norm(dim=1).mean() / errors.mean(dim=0).norm())
        told.append(f"{where} {gained:.1f}")
        if gained < 0.8 * _DRAWS**0.5:
            said = f"{where}: the mean of {_DRAWS} draws is only {gained:.1f} times nearer: a bias"
            return Outcome(name, False, said, _REPORT)
    if not told:
        return Outcome(name, True, "the recipe has none")
    return Outcome(
        name, True, f"no bias (8 without any: {', '.join(told)}), no constant, keys replay"
    )


def rotation(backend: Backend, recipe: Recipe, device: torch.device) -> Outcome:
    """Every rotation of the recipe: its matrix is orthogonal, the backend rotates as the reference does,
    and the product of two rotated matrices is that of the matrices."""
    name, casts, told = "rotation", _casts(recipe), []
    for gemm in GEMMS:
        pair = [casts[f"{gemm} {operand}"] for operand in OPERANDS[gemm]]
        size = pair[0].rotation_size
        if not size:
            continue
        matrix = hadamard_matrix(size, device=device).double()
        if not torch.allclose(matrix @ matrix.t(), torch.eye(size, device=device).double()):
            return Outcome(name, False, f"{gemm}: H{size} is not orthogonal", _REPORT)
        a, b = _noise(device), _noise(device, seed=1)
        turned = [oriented(x, cast).float() for x, cast in zip((a, b), pair, strict=True)]
        plain = [
            oriented(x, replace(cast, rotation_size=0)).float()
            for x, cast in zip((a, b), pair, strict=True)
        ]
        want = plain[0] @ plain[1].t()
        off = float((turned[0] @ turned[1].t() - want).norm() / want.norm())
        for x, cast, truth in zip((a, b), pair, turned, strict=True):
            made = backend.quantize(x, [cast])[0].dequantize()
            if float((made - truth).norm() / truth.norm()) > 0.5:
                return Outcome(name, False, f"{gemm}: the backend rotates otherwise", _REPORT)
        if off > 0.02:  # both rotated operands may be held in BF16
            return Outcome(name, False, f"{gemm}: it changes the product by {off:.1%}", _REPORT)
        told.append(f"{gemm} H{size} {off:.1e}")
    if not told:
        return Outcome(name, True, "the recipe has none")
    return Outcome(name, True, f"orthogonal; products differ by {', '.join(told)}")


def collectives(device: torch.device) -> Outcome:
    """Whether this machine's name resolves, and the bandwidth of a sum over the ranks that are here."""
    name = "collectives"
    try:
        socket.gethostbyname(socket.gethostname())
    except OSError:
        return Outcome(
            name, False, f"the machine's own name {socket.gethostname()} does not resolve",
            "give torchrun --local-addr 127.0.0.1, or use launch/torchrun.sh",
        )  # fmt: skip
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return Outcome(
            name, True, "one rank; torchrun --nproc-per-node N -m fp4pretrain doctor tries N"
        )
    tensor = torch.zeros(_MIB << 18, device=device)
    dist.all_reduce(tensor)  # connections are made
    begun = time.perf_counter()
    for _ in range(3):
        dist.all_reduce(tensor)
    float(tensor[0])  # waits for the device
    rate = 3 * tensor.nbytes / (time.perf_counter() - begun) / 1e9
    return Outcome(name, True, f"{dist.get_world_size()} ranks sum {_MIB} MiB at {rate:.2f} GB/s")


def disk(folder: Path) -> Outcome:
    """Whether there is room for checkpoints where runs are kept."""
    free = shutil.disk_usage(folder).free / 2**30
    return Outcome(
        "disk", free >= _ROOM_GIB, f"{free:.1f} GiB free in {folder}",
        "" if free >= _ROOM_GIB else "make room, or set run_dir to another disk",
    )  # fmt: skip


def wandb() -> Outcome:
    """Where runs would log to, without asking the network."""
    return Outcome("wandb", True, where_to())


def tensorboard() -> Outcome:
    """Whether the optional package is here; without it no run but one that asks for it is worse off."""
    here = find_spec("tensorboard") is not None
    told = "installed, for logging.tensorboard=true" if here else f"not installed ({INSTALL})"
    return Outcome("tensorboard", True, told)


def _casts(recipe: Recipe) -> dict[str, Cast]:
    """The six casts of a linear by ``gemm operand``."""
    casts = linear_casts(recipe.interned(), Moment(1, 0, 0), Shard("column"))
    return {key.replace(".", " "): cast for key, cast in casts.all().items()}


def _drawn(backend: Backend, x: Tensor, cast: Cast, key: int) -> Tensor:
    assert cast.noise is not None
    (operand,) = backend.quantize(x, [cast.drawn(replace(cast.noise, key=key), cast.signs)])
    return operand.dequantize()


def _noise(device: torch.device, *, seed: int = 0) -> Tensor:
    """Normal numbers [256, 256] in BF16, the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(_ROWS, _ROWS, generator=generator).bfloat16().to(device)
