"""Which casts of a trained model cost the most: each part of its recipe is quantized alone.

parts.py     the parts (a GEMM, an operand, a linear, a layer) and the recipes that quantize one
measure.py   loss and weight gradient of held-out batches with one part quantized, against BF16
search.py    the ranking, and the fewest BF16 rules that meet a target
"""

from fp4pretrain.train.culprit.search import Culprit, Fix, Ranked, find_culprit

__all__ = ["Culprit", "Fix", "Ranked", "find_culprit"]
