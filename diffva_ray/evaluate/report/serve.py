"""``diffva report --serve``: a read-only HTTP server for the report on the loopback address, also for a run on S3.

It reads only files below ``report/`` and answers only requests of this machine.
"""

from __future__ import annotations

import http.server
import re
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from urllib.parse import unquote, urlsplit

from diffva_ray.storage.store import Store, StoreError, is_local

LOOPBACK = "127.0.0.1"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=us-ascii",
    ".png": "image/png",
    ".webp": "image/webp",
}
FILE = re.compile(r"/(?:(?:data|images)/)?[0-9A-Za-z_-]+\.(?:html|js|png|webp)")  # every file name of a report


class ReportServer(http.server.ThreadingHTTPServer):
    """The server; ``port`` 0 takes any free port."""

    daemon_threads = True

    def __init__(self, store: Store, port: int = 0) -> None:
        self.store = store
        super().__init__((LOOPBACK, port), _Files)

    @property
    def address(self) -> str:
        """URL of the page."""
        return f"http://{LOOPBACK}:{self.server_port}/index.html"

    def file(self, path: str) -> str:
        """``path``, unless it is a link to a file outside the report. Raises FileNotFoundError."""
        if is_local(self.store.uri):
            root = Path(self.store.uri).resolve()
            if not (root / path).resolve().is_relative_to(root / "report"):
                raise FileNotFoundError(path)
        return path

    @property
    def hosts(self) -> set[str]:
        """Accepted Host headers; any other name may be a DNS rebinding attack."""
        return {f"{name}:{self.server_port}" for name in (LOOPBACK, "localhost")}


class _Files(http.server.BaseHTTPRequestHandler):
    server: ReportServer

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def _answer(self, body: bool) -> None:
        if self.headers.get("Host") not in self.server.hosts:
            self.send_error(HTTPStatus.FORBIDDEN)
            return
        path = unquote(urlsplit(self.path).path)
        path = "/index.html" if path == "/" else path
        if path == "/favicon.ico":  # browsers request it on their own
            self.send_response(HTTPStatus.NO_CONTENT)
            self.end_headers()
            return
        if not FILE.fullmatch(path):
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        try:
            data = self.server.store.read(self.server.file(f"report{path}"))
        except OSError:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        except StoreError:
            self.send_error(HTTPStatus.BAD_GATEWAY)
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", KINDS[path[path.rindex(".") :]])
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Suppress the line per request: a report has thousands of images."""


def serve(store: Store, port: int, announce: Callable[[str], None] = print) -> None:
    """Serve the report at ``store`` until interrupted. Raises OSError when the port is taken."""
    with ReportServer(store, port) as server:
        announce(f"open {server.address} (Ctrl-C ends)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return
