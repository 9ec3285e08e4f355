"""Documents out of tables: Parquet files, and the Arrow files of Hugging Face datasets on disk.

A column holds the text, named as the key of JSON records is. Rows are read in batches: a batch is in
memory, never a file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from fp4pretrain.errors import UserError, first_line

if TYPE_CHECKING:
    from fp4pretrain.data.records import Reading

TABLES = (".parquet", ".arrow")
_ROWS = 1024
_STATE = "state.json"  # beside the Arrow files of `Dataset.save_to_disk`


def table_rows(
    stream: BinaryIO, name: str, reading: Reading, *, kind: str
) -> Iterator[tuple[str, str]]:
    """The non-empty texts of a .parquet or .arrow file with their prompts, in the order of its rows.

    Raises:
        UserError: without pyarrow, for a damaged file, and for a file or row without the text.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise UserError(
            f"inputs: {name} needs the pyarrow package; pip install 'fp4pretrain[data]'"
        ) from None
    wanted = [reading.text_key]
    if reading.prompt_key is not None:
        wanted.append(reading.prompt_key)
    try:
        if kind == ".parquet":
            table = pq.ParquetFile(stream)
            _require(reading, table.schema_arrow.names, name)
            batches = table.iter_batches(_ROWS, columns=list(dict.fromkeys(wanted)))
        else:
            batches = pa.ipc.open_stream(stream)
            _require(reading, batches.schema.names, name)
        yield from _texts(
            ([batch.column(key) for key in wanted] for batch in batches), name, reading
        )
    except (pa.ArrowException, OSError) as error:
        reason = first_line(error)
        raise UserError(f"inputs: {name} is damaged ({reason}); write or copy it again") from None


def _require(reading: Reading, names: list[str], name: str) -> None:
    options = {"text": reading.text_key, "prompt": reading.prompt_key}
    for what, key in options.items():
        if key is not None and key not in names:
            shown = ", ".join(names[:8]) or "none"
            raise UserError(
                f'inputs: {name} has no column "{key}" (its columns: {shown}); name the column of the '
                f"{what} with --{what}-key"
            )


def _texts(batches: Iterator[list[Any]], name: str, reading: Reading) -> Iterator[tuple[str, str]]:
    row = 0
    for columns in batches:
        texts, *prompts = (column.to_pylist() for column in columns)
        for text, prompt in zip(texts, *prompts or [[""] * len(texts)], strict=True):
            row += 1
            if not isinstance(text, str):
                reading.broken(f'{name} row {row} has no text in "{reading.text_key}"; correct it')
            elif not isinstance(prompt, str):
                reading.broken(
                    f'{name} row {row} has no text in "{reading.prompt_key}"; correct it'
                )
            elif text:
                yield text, prompt


def is_dataset_file(path: Path) -> bool:
    """Whether an .arrow file is a dataset's own: ``datasets`` leaves caches of its work beside them.

    Raises UserError for a dataset that is a selection of its rows, whose order is in another file.
    """
    if path.suffix.lower() != ".arrow":
        return True
    state = path.parent / _STATE
    try:
        found = json.loads(state.read_text(encoding="utf-8"))
        if found.get("_indices_files") or found.get("_indices_data_files"):
            raise UserError(
                f"inputs: {path.parent} is a selection of a dataset's rows; save it again after "
                "flatten_indices()"
            )
        return path.name in {one["filename"] for one in found["_data_files"]}
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return not path.name.startswith("cache-")
