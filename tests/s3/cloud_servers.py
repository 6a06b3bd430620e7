"""Servers of the other clouds on loopback: Azurite, and moto's S3 server behind Google's names of the same requests.

No emulator of Google Cloud Storage that pip installs answers the XML requests that obstore sends. But for names of
headers they are requests of S3, so a proxy translates the condition and moto checks it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import shutil
import subprocess
import time
import urllib.request
from email.utils import formatdate
from pathlib import Path

from faulty import Headers, Proxy
from swift_server import end_with_parent, free_ports, listens

ACCOUNT = "devstoreaccount1"  # of every Azurite, as its documentation gives it
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
TOKEN = "token-of-the-google"
API = "2021-12-02"
SIGNED = "AWS4-HMAC-SHA256 Credential=key/20200101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"


def as_s3(headers: Headers) -> Headers:
    """Headers of Google's XML API as S3 calls them."""
    names = {"x-goog-if-generation-match": "If-None-Match", "authorization": "Authorization"}
    values = {("x-goog-if-generation-match", "0"): "*", ("authorization", f"Bearer {TOKEN}"): SIGNED}
    return {names.get(name.lower(), name): values.get((name.lower(), value), value) for name, value in headers.items()}


def google(moto: str) -> Proxy:
    """A proxy that speaks Google's XML API before moto's S3 server at ``moto``."""
    return Proxy(moto, lambda *_: None, as_s3)


def azurite_program() -> str | None:
    """The program of Azurite's blob service; None if it is not installed."""
    return shutil.which("azurite-blob")


class Azurite:
    """Microsoft's emulator of Azure Storage, which checks signatures. Started on construction; ``stop`` ends it."""

    def __init__(self, program: str, folder: Path) -> None:
        [port] = free_ports(1)
        self.endpoint = f"http://127.0.0.1:{port}/{ACCOUNT}"
        with open(folder / "azurite.log", "wb") as log:
            self.process = subprocess.Popen(
                [program, "--blobHost", "127.0.0.1", "--blobPort", str(port), "--inMemoryPersistence", "--silent",
                 "--skipApiVersionCheck", "--disableTelemetry"],
                stdout=log, stderr=log, cwd=folder, preexec_fn=end_with_parent,
            )  # fmt: skip
        until = time.monotonic() + 60
        while not listens(port):
            if time.monotonic() > until or self.process.poll() is not None:
                self.stop()
                raise RuntimeError(f"Azurite did not start:\n{(folder / 'azurite.log').read_text()[-500:]}")
            time.sleep(0.05)

    def stop(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def create(self, container: str) -> None:
        """Create a container: obstore cannot. The request is signed with the account's key."""
        own = f"x-ms-date:{formatdate(usegmt=True)}\nx-ms-version:{API}\n"
        text = f"PUT{chr(10) * 12}{own}/{ACCOUNT}/{ACCOUNT}/{container}\nrestype:container"
        signature = hmac.new(base64.b64decode(KEY), text.encode(), hashlib.sha256).digest()
        headers = dict(line.split(":", 1) for line in own.splitlines())
        headers["Authorization"] = f"SharedKey {ACCOUNT}:{base64.b64encode(signature).decode()}"
        request = urllib.request.Request(
            f"{self.endpoint}/{container}?restype=container", method="PUT", headers={**headers, "Content-Length": "0"}
        )
        urllib.request.urlopen(request, timeout=60).close()
