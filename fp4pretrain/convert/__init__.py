"""Models out of a run: Hugging Face's folders of safetensors, config.json and tokenizer, and megatron-core's
checkpoints.

Nothing here needs the transformers package: its files are written and read as files.
"""

from fp4pretrain.convert.export import Export, export_hf
from fp4pretrain.convert.megatron import export_megatron
from fp4pretrain.convert.packed import LAYOUTS

__all__ = ["LAYOUTS", "Export", "export_hf", "export_megatron"]
