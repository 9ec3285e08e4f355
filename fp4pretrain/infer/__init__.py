"""A trained model at work, on one process: it generates, and it is evaluated."""

from fp4pretrain.infer.calibration import largest_inputs
from fp4pretrain.infer.model import Model, load_model
from fp4pretrain.infer.record import record
from fp4pretrain.infer.sampling import Sampling, generate
from fp4pretrain.infer.text import TextLoss, text_loss

__all__ = [
    "Model",
    "Sampling",
    "TextLoss",
    "generate",
    "largest_inputs",
    "load_model",
    "record",
    "text_loss",
]
