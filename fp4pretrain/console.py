"""Console output in any locale: what an ASCII or Latin terminal cannot show is written in characters that
it has."""

from __future__ import annotations

import codecs
import io
from typing import TextIO

_PLAIN = str.maketrans(
    {
        **{"±": "+-", "→": "->", "←": "<-", "×": "x", "·": "-", "…": "...", "≈": "~", "≤": "<="},
        **{"≥": ">=", "–": "-", "—": "-", "−": "-", "σ": "sigma", "µ": "u", "\ufffd": "?"},
        **{"‘": "'", "’": "'", "“": '"', "”": '"', "━": "-", "─": "-", "│": "|", "┃": "|"},
    }
)


def plain_console(*streams: TextIO) -> None:
    """Let these streams write ``+-`` for ``±`` where their encoding has none, and ``?`` for the rest."""
    codecs.register_error("plain", _plain)
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(errors="plain")


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_PLAIN)
    return "".join(c if c.isascii() else "?" for c in text), error.end
