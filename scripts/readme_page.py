"""README as the first page of the site: mkdocs calls this while it builds (mkdocs.yml, hooks).

Only its links change: README names files of docs/ from the top level, a page names them from docs/. So
the strict build checks README's links too.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent


def on_files(files: Files, *, config: Any) -> Files:
    """Adds index.md, made of README.md, to the pages."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    files.append(File.generated(config, "index.md", content=re.sub(r"\]\(docs/", "](", text)))
    return files
