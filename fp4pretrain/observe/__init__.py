"""Watching a run from outside: metrics sinks, throughput and memory.

Nothing in ``nn`` or ``ops`` imports this package: it is handed finished rows of numbers.
"""

from fp4pretrain.observe.about import About, Table
from fp4pretrain.observe.console import ConsoleSink
from fp4pretrain.observe.jsonl import JsonlSink, read_rows
from fp4pretrain.observe.overlap import overlap
from fp4pretrain.observe.sink import DECIDED, HAPPENED, CompositeSink, Row, Sink
from fp4pretrain.observe.throughput import Throughput, flops_per_token, memory_gib, peak_flops
from fp4pretrain.observe.wandb_sink import WandbSink, stored_run_id

__all__ = [
    "DECIDED",
    "HAPPENED",
    "About",
    "CompositeSink",
    "ConsoleSink",
    "JsonlSink",
    "Row",
    "Sink",
    "Table",
    "Throughput",
    "WandbSink",
    "flops_per_token",
    "memory_gib",
    "overlap",
    "peak_flops",
    "read_rows",
    "stored_run_id",
]
