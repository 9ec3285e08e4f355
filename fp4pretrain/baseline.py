"""What ``baseline`` names: a recipe to train first, the folder of a run, or a run on wandb."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import urlsplit

from fp4pretrain.presets import groups

_PREFIX = "wandb:"
_PATH = re.compile(r"[^/\s]+/[^/\s]+/[^/\s]+")
_PAGE = re.compile(r"/([^/\s]+)/([^/\s]+)/runs/([^/\s]+)(?:/.*)?")


@dataclass(frozen=True)
class WandbPath:
    """``entity/project/run_id``, and the server whose page named it (None: the one wandb uses)."""

    path: str
    server: str | None = None

    def __str__(self) -> str:
        return f"{_PREFIX}{self.path}"


def is_recipe(named: str | None) -> bool:
    """Whether ``baseline`` is a file of ``configs/precision``."""
    return named in groups()["precision"]


def wandb_path(named: str | None) -> WandbPath | None:
    """The run that ``wandb:ENTITY/PROJECT/RUN_ID`` or the address of its page names; None for another
    text."""
    if named is None:
        return None
    if named.startswith(_PREFIX):
        path = named.removeprefix(_PREFIX)
        return WandbPath(path) if _PATH.fullmatch(path) else None
    address = urlsplit(named)
    page = _PAGE.fullmatch(address.path)
    if address.scheme not in ("http", "https") or page is None:
        return None
    return WandbPath("/".join(page.groups()), f"{address.scheme}://{address.netloc}")
