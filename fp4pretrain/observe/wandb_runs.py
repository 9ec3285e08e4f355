"""A run on wandb, read through wandb's public API: its config, and curves over tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from fp4pretrain.baseline import WandbPath
from fp4pretrain.errors import UserError, first_line
from fp4pretrain.observe.wandb_sink import has_api_key

_PAGE = 50_000  # steps asked for at once; few of them have a row
_HOSTED_API = "https://api.wandb.ai"


@dataclass(frozen=True)
class WandbRun:
    """``curves``: key -> (tokens, value) of each row that has it. ``going``: whether more may come."""

    name: str
    config: Mapping[str, Any]
    curves: Mapping[str, Sequence[tuple[float, float]]]
    going: bool


def fetch(path: WandbPath, keys: Sequence[str]) -> WandbRun:
    """Read the run from the server. Raises UserError, one line with its cure, where that cannot be done."""
    try:
        import wandb

        base = str(wandb.setup().settings.base_url)
        server = None if path.server is None else _api_of(path.server)
        if server is not None and urlsplit(server).netloc == urlsplit(base).netloc:
            server = None
        if not has_api_key(server or base):
            raise UserError(
                f"baseline: {path} is read from {server or base}, and no API key is set; set one with "
                "wandb login, or give the folder of a run"
            )
        api = wandb.Api(overrides={"base_url": server} if server else None)
        run = api.run(path.path)
        curves = {
            key: sorted(  # by tokens alone: of two rows at the same tokens the later one stays later
                (
                    (float(row["tokens"]), float(row[key]))
                    for row in run.scan_history(keys=["tokens", key], page_size=_PAGE)
                ),
                key=lambda point: point[0],
            )
            for key in keys
        }
        return WandbRun(str(run.name), dict(run.config), curves, going=run.state == "running")
    except UserError:
        raise
    except Exception as error:  # of the network, the server, the package
        line = first_line(error)
        raise UserError(
            f"baseline: {path} cannot be read ({line}); look at its name, the network and wandb login, or "
            "give the folder of a run"
        ) from None


def _api_of(page: str) -> str:
    """The server behind a run's page: wandb.ai's has an address of its own, others are the page's."""
    return _HOSTED_API if urlsplit(page).netloc.removeprefix("www.") == "wandb.ai" else page
