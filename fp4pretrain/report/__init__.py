"""Comparing runs: the loss gap at matched tokens, as a table, a picture, one HTML page and JSON."""

from fp4pretrain.report.compare import Options, compare
from fp4pretrain.report.comparison import Comparison
from fp4pretrain.report.noise import measure_noise, noise_table, read_noise
from fp4pretrain.report.record import as_json
from fp4pretrain.report.table import table

__all__ = [
    "Comparison",
    "Options",
    "as_json",
    "compare",
    "measure_noise",
    "noise_table",
    "read_noise",
    "table",
]
