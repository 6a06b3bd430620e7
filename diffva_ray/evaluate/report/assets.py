"""What the page carries in itself: its style, the viewer's modules joined to one script, and the policy that allows it.

A page from disk cannot import modules, so they are put one behind the other, imports and exports taken off: nothing is
translated, and what runs is what is read in ``viewer/``.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined

HERE = resources.files(__package__)
MODULES = (
    "dom", "records", "query", "list", "score", "zoom", "stage", "detail", "controls", "address", "keyboard", "main",
)  # fmt: skip
IMPORT = re.compile(r'^import \{[^}]*\} from "\./(\w+)\.js";\n', re.MULTILINE)
EXPORT = re.compile(r"^export (?=(?:async function|function|const|class) )", re.MULTILINE)


def style(*names: str) -> str:
    return "".join((HERE / name).read_text() for name in names)


def viewer_script() -> str:
    """The modules of the viewer in the order in which they import each other, as the text of one module."""
    parts = ['"use strict";\n']
    for name in MODULES:
        text = (HERE / "viewer" / f"{name}.js").read_text()
        parts.append(f"\n// {name}.js\n{EXPORT.sub('', IMPORT.sub('', text))}")
    return "".join(parts)


def policy(style: str, script: str) -> str:
    """Content-Security-Policy: pictures beside the page, this very style and script, and the files of records that this
    script asks for; nothing else, and nothing that markup could ask for."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    trust = " 'strict-dynamic'" if script else ""
    return (
        f"default-src 'none'; img-src 'self' file:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'"
        f"{trust}; base-uri 'none'; form-action 'none'"
    )


def templates(**filters: Callable[..., Any]) -> Environment:
    """The templates of this folder, with ``filters`` by name; every value is escaped, an unknown one is an error."""
    environment = Environment(
        loader=FunctionLoader(lambda name: (HERE / name).read_text()),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= filters
    return environment
