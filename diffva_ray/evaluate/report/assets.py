"""Templates, style and script of all pages (report, comparison, paper), rendered into one offline HTML file.

A page opened from disk cannot import modules, so the viewer's modules are concatenated in import order with their
``import`` and ``export`` keywords removed. There is no other build step.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from diffva_ray.evaluate.report.numbers import count, number, plain

HERE = resources.files(__package__)
MODULES = (
    "dom", "records", "query", "list", "score", "zoom", "stage", "detail", "controls", "address", "keyboard", "main",
)  # fmt: skip
IMPORT = re.compile(r'^import \{[^}]*\} from "\./(\w+)\.js";\n', re.MULTILINE)
EXPORT = re.compile(r"^export (?=(?:async function|function|const|class) )", re.MULTILINE)


def viewer_script() -> str:
    """The viewer's modules as the text of one module."""
    parts = ['"use strict";\n']
    for name in MODULES:
        text = (HERE / "viewer" / f"{name}.js").read_text()
        parts.append(f"\n// {name}.js\n{EXPORT.sub('', IMPORT.sub('', text))}")
    return "".join(parts)


def render_page(template: str, styles: Sequence[str], values: dict[str, Any], script: str = "") -> str:
    """``template`` of this folder as HTML, with the CSS files ``styles`` and ``script`` inline.

    Every value is escaped; an undefined name in the template is an error.
    """
    environment = Environment(
        loader=FunctionLoader(lambda name: (HERE / name).read_text()),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"count": count, "number": number, "plain": plain}
    css = "".join((HERE / name).read_text() for name in styles)
    # style and script are files of this package and are not escaped: the policy holds the hash of their exact text
    inline = {"style": Markup(css), "script": Markup(script), "policy": _policy(css, script)}
    return environment.get_template(template).render({**inline, **values})


def _policy(css: str, script: str) -> str:
    """Content-Security-Policy: images beside the page, this style, this script, and the files that the script loads."""
    css_hash, script_hash = (
        base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (css, script)
    )
    trust = " 'strict-dynamic'" if script else ""
    return (
        f"default-src 'none'; img-src 'self' file:; style-src 'sha256-{css_hash}'; script-src 'sha256-{script_hash}'"
        f"{trust}; base-uri 'none'; form-action 'none'"
    )
