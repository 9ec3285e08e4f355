"""Text → tokens → Megatron indexed datasets → microbatches.

A leaf: nothing here knows of models or training. `validate` and `build_datasets` serve a run,
`prepare_text`, `train_bpe` and `inspect` the verb `fp4pretrain data`.
"""

from __future__ import annotations

from fp4pretrain.data.batches import (
    EvaluationSampler,
    MicrobatchSampler,
    batches,
    evaluation_batches,
)
from fp4pretrain.data.build import inspect, prepare_text, train_bpe, verify
from fp4pretrain.data.datasets import RandomTokens, RunData, build_datasets
from fp4pretrain.data.entropy import unigram_entropy
from fp4pretrain.data.indexed import DatasetIndex, read_index
from fp4pretrain.data.records import Reading
from fp4pretrain.data.spec import DataSpec, validate
from fp4pretrain.data.stream import document_places
from fp4pretrain.data.tokenizers import Tokenizer, load_tokenizer
from fp4pretrain.data.validation import ValidationSet

__all__ = [
    "DataSpec",
    "DatasetIndex",
    "EvaluationSampler",
    "MicrobatchSampler",
    "RandomTokens",
    "Reading",
    "RunData",
    "Tokenizer",
    "ValidationSet",
    "batches",
    "build_datasets",
    "document_places",
    "evaluation_batches",
    "inspect",
    "load_tokenizer",
    "prepare_text",
    "read_index",
    "train_bpe",
    "unigram_entropy",
    "validate",
    "verify",
]
