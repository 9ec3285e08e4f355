"""Models out of a run and into one: Hugging Face's folders of safetensors, config.json and tokenizer.

Nothing here needs the transformers package: its files are written and read as files.
"""

from fp4pretrain.convert.export import Export, export_hf

__all__ = ["Export", "export_hf"]
