"""megatron-core's GPTDataset, which also refuses ids that the model cannot take.

`ids.check_ids` reads all of a small dataset before training and samples of a large one; what it did not
read is checked here, sample by sample (microseconds).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core.datasets import gpt_dataset

from fp4pretrain.data.ids import PADDING, refuse_sample


@dataclass
class GPTDatasetConfig(gpt_dataset.GPTDatasetConfig):
    """megatron-core's, and the model's number of ids (None: the tokenizer's)."""

    id_limit: int | None = None


class GPTDataset(gpt_dataset.GPTDataset):  # the same name: megatron-core's cached indices have it
    """Samples as megatron-core's. Raises LocalError for an id the model has not, naming the document."""

    config: GPTDatasetConfig

    def _query_document_sample_shuffle_indices(self, idx: int) -> tuple[Any, Any]:
        text, documents = super()._query_document_sample_shuffle_indices(idx)
        limit = self.config.id_limit or self.config.tokenizer.vocab_size
        if text.min() < PADDING or text.max() >= limit:
            for document in documents.tolist():
                refuse_sample(
                    self.dataset.get(document),
                    document=document,
                    prefix=str(self.dataset_path),
                    vocab_size=limit,
                )
        return text, documents
