"""``diffva report --serve``: the report's folder on this machine's loopback address, also where the run is on S3.

Nothing but files below ``report/`` is read, nobody but this machine is answered, and nothing is ever written.
"""

from __future__ import annotations

import http.server
import re
from collections.abc import Callable
from http import HTTPStatus
from urllib.parse import unquote, urlsplit

from diffva_ray.storage.store import Store, StoreError

LOOPBACK = "127.0.0.1"
KINDS = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=us-ascii",
    ".png": "image/png",
    ".webp": "image/webp",
}
FILE = re.compile(r"/(?:(?:data|images)/)?[0-9A-Za-z_-]+\.(?:html|js|png|webp)")  # all that a report is made of


class ReportServer(http.server.ThreadingHTTPServer):
    """Answers on loopback; ``port`` 0 takes any that is free. ``address`` is what to open."""

    daemon_threads = True

    def __init__(self, store: Store, port: int = 0) -> None:
        self.store = store
        super().__init__((LOOPBACK, port), _Files)

    @property
    def address(self) -> str:
        return f"http://{LOOPBACK}:{self.server_port}/index.html"

    @property
    def hosts(self) -> set[str]:
        """Names this server answers to: another name that leads here is another site's trick to read the images."""
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
        if path == "/favicon.ico":  # browsers ask unasked
            self.send_response(HTTPStatus.NO_CONTENT)
            self.end_headers()
            return
        if not FILE.fullmatch(path):
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        try:
            data = self.server.store.read(f"report{path}")
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
        """Nothing: a line for each of thousands of pictures tells nobody anything."""


def serve(store: Store, port: int, announce: Callable[[str], None] = print) -> None:
    """Serve the report at ``store`` until interrupted. Raises OSError when the port is taken."""
    with ReportServer(store, port) as server:
        announce(f"open {server.address} (Ctrl-C ends)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return
