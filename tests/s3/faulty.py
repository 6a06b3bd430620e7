"""A proxy before an S3 server that gives chosen requests an answer of its own: throttling, refusals, broken bodies."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

SLOW_DOWN = (503, "SlowDown")
NOT_IMPLEMENTED = (501, "NotImplemented")
EXPIRED = (400, "ExpiredToken")
CONFLICT = (409, "ConditionalRequestConflict")
DENIED = (403, "AccessDenied")
BREAK_OFF = (0, "")  # half of the body, then the end
Headers = dict[str, str]
Rule = Callable[[str, str, dict[str, str]], tuple[int, str] | None]  # method, path, headers -> the answer


class Proxy:
    """Between ``with`` and its end at ``endpoint``; ``rule`` picks the answer, None passes a request on. ``translate``
    changes the headers that are passed on."""

    def __init__(self, target: str, rule: Rule, translate: Callable[[Headers], Headers] = dict) -> None:
        self.rule, self.target, self.translate = rule, urlsplit(target).netloc, translate
        self.answered = 0  # requests that got the rule's answer
        self.passed: list[tuple[str, str]] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"proxy": self}))
        self.server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Proxy:
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def first(count: int, answer: tuple[int, str], method: str = "", header: str = "") -> Rule:
    """``answer`` for the first ``count`` requests of ``method`` with ``header``; both default to any."""
    lock, left = threading.Lock(), [count]

    def rule(asked: str, path: str, headers: dict[str, str]) -> tuple[int, str] | None:
        with lock:
            if left[0] == 0 or (method and asked != method) or (header and header not in headers):
                return None
            left[0] -= 1
            return answer

    return rule


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        chosen = self.proxy.rule(self.command, self.path, headers)
        if chosen not in (None, BREAK_OFF):
            self.proxy.answered += 1
            status, code = chosen
            message = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>of the test</Message></Error>".encode()
            self.reply(status, {"Content-Type": "application/xml"}, message)
            return
        self.proxy.passed.append((self.command, self.path))
        connection = http.client.HTTPConnection(self.proxy.target, timeout=60)
        try:
            sent = self.proxy.translate(dict(self.headers.items()))  # Host stays: it is signed
            connection.request(self.command, self.path, body, sent)
            response = connection.getresponse()
            self.reply(response.status, dict(response.getheaders()), response.read(), chosen == BREAK_OFF)
        finally:
            connection.close()

    def reply(self, status: int, headers: dict[str, str], body: bytes, break_off: bool = False) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("transfer-encoding", "connection", "date", "server", "content-length"):
                self.send_header(name, value)
        length = headers.get("Content-Length", "0") if self.command == "HEAD" else str(len(body))
        self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body[: len(body) // 2] if break_off else body)
        if break_off:
            self.proxy.answered += 1
            self.close_connection = True

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = answer

    def log_message(self, *_: object) -> None:
        pass
