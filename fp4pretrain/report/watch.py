"""``compare --watch``: the page of runs that go on, served on this machine and made again as they grow.

The browser asks for the stamp of the runs' metrics every few seconds and loads the page again when it is
another. A comparison that is refused (a run has no row yet) is told on the page, and tried again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from fp4pretrain.errors import UserError
from fp4pretrain.report.comparison import Comparison
from fp4pretrain.report.page import page

_SECONDS = 5.0
_HOST = "127.0.0.1"


class Watched:
    """The page of a comparison, as new as the runs' metrics.

    Args:
        runs: folders, of which those that hold a run are looked at.
        compared: makes the comparison anew.
    """

    def __init__(self, runs: Sequence[Path], compared: Callable[[], Comparison]) -> None:
        self._files = [Path(run) / "metrics.jsonl" for run in runs]
        self._compared = compared
        self.stamp = ""
        self.page = ""

    def refresh(self) -> bool:
        """Make the page again where any run has new rows; returns whether it did."""
        now = self._state()
        if now == self.stamp:
            return False
        self.stamp = now
        try:
            self.page = page(self._compared(), stamp=now)
        except UserError as error:
            self.page = (
                '<!doctype html><html lang="en"><meta charset="utf-8">'
                '<meta http-equiv="refresh" content="5"><title>waiting</title>'
                f"<body><p>{escape(str(error))}</p></body></html>"
            )
        return True

    def _state(self) -> str:
        found = []
        for file in self._files:
            if file.is_file():
                found.append(f"{file.stat().st_mtime_ns}-{file.stat().st_size}")
        return ".".join(found) or "none"


def server(watched: Watched, port: int) -> ThreadingHTTPServer:
    """Serves ``/`` (the page) and ``/stamp``. Raises UserError where the port cannot be had."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = watched.stamp if self.path == "/stamp" else watched.page
            if self.path not in ("/", "/stamp"):
                self.send_error(404)
                return
            kind = "text/html" if self.path == "/" else "text/plain"
            data = body.encode()
            self.send_response(200)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Print nothing: a line for every request is of no use."""

    try:
        return ThreadingHTTPServer((_HOST, port), Handler)
    except OSError as error:
        raise UserError(
            f"port: {port} cannot be had ({error.strerror}); give another --port"
        ) from None


def watch(watched: Watched, *, port: int, say: Callable[[str], None]) -> None:
    """Serve until interrupted."""
    watched.refresh()
    served = server(watched, port)
    Thread(target=served.serve_forever, daemon=True).start()
    say(f"http://{_HOST}:{served.server_port}/ follows the runs; Ctrl-C ends it")
    try:
        while True:
            time.sleep(_SECONDS)
            watched.refresh()
    finally:
        served.shutdown()
