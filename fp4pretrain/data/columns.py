"""Documents out of tables: Parquet files, and the Arrow files of Hugging Face datasets on disk.

A column holds the text, named as the key of JSON records is. Rows are read in batches: a batch is in
memory, never a file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from fp4pretrain.errors import UserError

if TYPE_CHECKING:
    from fp4pretrain.data.records import Reading

TABLES = (".parquet", ".arrow")
_ROWS = 1024
_STATE = "state.json"  # beside the Arrow files of `Dataset.save_to_disk`


def table_documents(stream: BinaryIO, name: str, reading: Reading, *, kind: str) -> Iterator[str]:
    """The non-empty texts of a .parquet or .arrow file, in the order of its rows.

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
    try:
        if kind == ".parquet":
            table = pq.ParquetFile(stream)
            names, batches = table.schema_arrow.names, table.iter_batches
            _require(reading.text_key, names, name)
            columns = (b.column(0) for b in batches(_ROWS, columns=[reading.text_key]))
        else:
            opened = pa.ipc.open_stream(stream)
            _require(reading.text_key, opened.schema.names, name)
            columns = (batch.column(reading.text_key) for batch in opened)
        yield from _texts(columns, name, reading)
    except (pa.ArrowException, OSError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"inputs: {name} is damaged ({reason}); write or copy it again") from None


def _require(key: str, names: list[str], name: str) -> None:
    if key not in names:
        shown = ", ".join(names[:8]) or "none"
        raise UserError(
            f'inputs: {name} has no column "{key}" (its columns: {shown}); name the column of the text '
            "with --text-key"
        )


def _texts(columns: Iterator[Any], name: str, reading: Reading) -> Iterator[str]:
    row = 0
    for column in columns:
        for value in column.to_pylist():
            row += 1
            if not isinstance(value, str):
                reading.broken(f'{name} row {row} has no text in "{reading.text_key}"; correct it')
            elif value:
                yield value


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
