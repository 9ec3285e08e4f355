"""Comparing runs: the loss gap at matched tokens, as a table, a picture and one HTML page."""

from fp4pretrain.report.compare import compare
from fp4pretrain.report.comparison import Comparison

__all__ = ["Comparison", "compare"]
