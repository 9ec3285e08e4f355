"""The plan: which linear of which layer computes by which recipe, and from when on.

Layers are counted globally (0 is the model's first block on every pipeline layout), so a plan is
the same text on one process and on a thousand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from fp4pretrain.errors import UserError
from fp4pretrain.precision.recipe import BF16, GEMMS, OPERANDS, Recipe, text_table

LINEARS = (
    "self_attention.linear_qkv",
    "self_attention.linear_proj",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
)


@dataclass(frozen=True)
class Keep:
    """What stays in BF16.

    ``first_blocks`` and ``last_blocks``: a number of blocks (2) or a fraction of all blocks
    (0.13, rounded to the nearest block), so that one recipe serves 4 layers and 62;
    ``modules``: shell patterns on global names such as ``layers.3.mlp.linear_fc2`` or
    ``*.linear_qkv``.
    """

    first_blocks: float = 0
    last_blocks: float = 0
    modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key in ("first_blocks", "last_blocks"):
            value = getattr(self, key)
            if not 0 <= value < math.inf or (value >= 1 and value != int(value)):
                raise UserError(
                    f"precision.keep.{key}: {value} is neither a number of blocks (0, 1, 2, ...) "
                    "nor a fraction of them (0 to 1)"
                )

    def blocks(self, num_layers: int) -> set[int]:
        """The global indices of the blocks kept whole."""

        def count(value: float) -> int:
            return math.floor(value * num_layers + 0.5) if value < 1 else int(value)

        first, last = count(self.first_blocks), count(self.last_blocks)
        return {i for i in range(num_layers) if i < first or i >= num_layers - last}


@dataclass(frozen=True)
class Tail:
    """The late switch: from ``at`` (a fraction of the run) the named GEMMs run in BF16."""

    at: float | None = None
    to_bf16: tuple[str, ...] = ("fprop",)

    def __post_init__(self) -> None:
        if self.at is not None and not 0 <= self.at <= 1:
            raise UserError(f"precision.tail.at: {self.at} is no fraction of the run; use 0 to 1")
        if self.at is not None and not self.to_bf16:
            raise UserError(
                "precision.tail.to_bf16: nothing would be switched; name fprop, dgrad, wgrad, or "
                "set precision.tail.at=null"
            )
        for gemm in self.to_bf16:
            if gemm not in GEMMS:
                raise UserError(
                    f"precision.tail.to_bf16: {gemm!r} is no GEMM; use fprop, dgrad, wgrad"
                )


@dataclass(frozen=True)
class Plan:
    """(global layer, linear, progress) -> Recipe. Raises UserError for a plan that cannot be meant."""

    recipe: Recipe
    num_layers: int
    keep: Keep = field(default_factory=Keep)
    tail: Tail = field(default_factory=Tail)

    def __post_init__(self) -> None:
        names = [self.name(layer, linear) for layer in range(self.num_layers) for linear in LINEARS]
        for pattern in self.keep.modules:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UserError(
                    f"precision.keep.modules: {pattern!r} matches no linear; names look like "
                    f"{names[0]} (layers 0 to {self.num_layers - 1})"
                )
        if self.recipe.quantized and all(
            self.kept(layer, linear) for layer in range(self.num_layers) for linear in LINEARS
        ):
            raise UserError(
                f"precision.keep: it keeps all {self.num_layers} blocks in BF16, so nothing is "
                "quantized; keep fewer blocks or use precision=bf16"
            )

    @staticmethod
    def name(layer: int, linear: str) -> str:
        """The global name that patterns match: ``layers.{layer}.{linear}``."""
        return f"layers.{layer}.{linear}"

    def kept(self, layer: int, linear: str) -> bool:
        """Whether this linear stays in BF16 for the whole run."""
        name = self.name(layer, linear)
        return layer in self.keep.blocks(self.num_layers) or any(
            fnmatchcase(name, pattern) for pattern in self.keep.modules
        )

    def at(self, layer: int, linear: str, progress: float) -> Recipe:
        """The recipe of one linear at ``progress`` (0 at the first step, 1 at the end)."""
        if self.kept(layer, linear):
            return BF16
        return self.main(progress)

    def main(self, progress: float) -> Recipe:
        """The recipe of the linears that are not kept."""
        if self.tail.at is not None and progress >= self.tail.at:
            return self.recipe.to_bf16(self.tail.to_bf16)
        return self.recipe

    def check_shape(self, linear: str, *, tokens: int, n: int, k: int) -> None:
        """Raises UserError when a block or rotation does not divide a LOCAL dimension.

        ``tokens`` of one microbatch after gathering, ``n`` output and ``k`` input features held by
        one tensor-parallel rank.
        """
        contracted = {"fprop": k, "dgrad": n, "wgrad": tokens}
        w_rows = {"fprop": n, "dgrad": k}
        names = {"fprop": "input features", "dgrad": "output features", "wgrad": "tokens"}
        for gemm in GEMMS:
            size, what = contracted[gemm], names[gemm]
            for operand in OPERANDS[gemm]:
                spec = self.recipe.operand(gemm, operand)
                rows, cols = spec.row.blocks[spec.block]
                key = f"precision.{gemm}.{operand}.block"
                if spec.quantized and cols and size % cols:
                    raise UserError(
                        f"{key}: {spec.format} blocks of {cols} do not divide {linear}'s {size} "
                        f"{what} on a rank; change the model's size, train.micro_batch or "
                        "parallel.tensor"
                    )
                if operand == "w" and rows > 1 and w_rows[gemm] % rows:
                    raise UserError(
                        f"{key}: 2d tiles of {rows} do not divide {linear}'s {w_rows[gemm]} rows on "
                        "a rank; use block: 1d or change the model's size"
                    )
            rotation = self.recipe.gemm(gemm).rotation
            if rotation.active and size % rotation.size:
                raise UserError(
                    f"precision.{gemm}.rotation.size: {rotation.size} does not divide {linear}'s "
                    f"{size} {what} on a rank; use a smaller size"
                )

    def __str__(self) -> str:
        kept = sorted(self.keep.blocks(self.num_layers))
        rows = []
        for layer in range(self.num_layers):
            cells = ["BF16" if self.kept(layer, name) else "recipe" for name in LINEARS]
            rows.append((str(layer), *cells))
        header = ("layer", *(name.split("_")[-1] for name in LINEARS))
        quantized = sum(not self.kept(i, n) for i in range(self.num_layers) for n in LINEARS)
        total = self.num_layers * len(LINEARS)
        lines = [
            str(self.recipe),
            "",
            f"{quantized} of {total} linears follow the recipe; "
            f"blocks kept in BF16: {', '.join(map(str, kept)) or 'none'}; "
            "embedding, head, norms and attention products are never quantized",
        ]
        if self.tail.at is not None:
            switched = self.recipe.to_bf16(self.tail.to_bf16)
            lines += ["", f"from {self.tail.at:.0%} of the run on:", str(switched)]
        return "\n".join([*lines, "", text_table(header, rows)])
