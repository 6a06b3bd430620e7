"""A hook of mkdocs: the pages of docs/project are files of the repository's root, with links as seen from the site."""

from __future__ import annotations

from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FILES = {
    "project/architecture.md": "ARCHITECTURE.md",
    "project/contributing.md": "CONTRIBUTING.md",
    "project/changelog.md": "CHANGELOG.md",
}


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    name = FILES.get(page.file.src_uri)
    return markdown if name is None else (ROOT / name).read_text(encoding="utf-8").replace("](docs/", "](../")
