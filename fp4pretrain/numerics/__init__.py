"""The truth of this project: formats, rounding, scales, rotation and GEMM in plain PyTorch.

Runs on any device, knows nothing of the rest of fp4pretrain, and every kernel is held to it: codes
and scales under nearest rounding bit for bit, stochastic rounding by law.

    q = quantize(x, QuantSpec(format="nvfp4"))          # packed codes, block scales, amax
    values, alpha = emulate(x, QuantSpec("nvfp4"))      # the same numbers, unpacked and fast
    y = gemm_reference(q_a, q_b)                        # a @ b.T
"""

from fp4pretrain.numerics.blocks import tensor_amax
from fp4pretrain.numerics.formats import FORMATS, Element, Format, ScaleLevel
from fp4pretrain.numerics.gemm import gemm_reference
from fp4pretrain.numerics.measures import (
    cosine,
    relative_error,
    saturation_fraction,
    sqnr_db,
    underflow_fraction,
)
from fp4pretrain.numerics.noise import (
    Noise,
    derive_key,
    derive_keys,
    random_sign_words,
    random_signs,
)
from fp4pretrain.numerics.quantize import QuantizedTensor, emulate, quantize
from fp4pretrain.numerics.rotation import hadamard_matrix, rotate, signs_te
from fp4pretrain.numerics.scaling import spanning_amax
from fp4pretrain.numerics.spec import QuantSpec, every_spec

__all__ = [
    "FORMATS",
    "Element",
    "Format",
    "Noise",
    "QuantSpec",
    "QuantizedTensor",
    "ScaleLevel",
    "cosine",
    "derive_key",
    "derive_keys",
    "emulate",
    "every_spec",
    "gemm_reference",
    "hadamard_matrix",
    "quantize",
    "random_sign_words",
    "random_signs",
    "relative_error",
    "rotate",
    "saturation_fraction",
    "signs_te",
    "spanning_amax",
    "sqnr_db",
    "tensor_amax",
    "underflow_fraction",
]
