"""An HTML page as a browser reads it: links, images, tags, text, inline style and script, and its policy."""

from __future__ import annotations

from html.parser import HTMLParser


class Page(HTMLParser):
    """Parses a page, and fails on attributes that its policy would refuse."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.tags: list[str] = []
        self.blocks: dict[str, list[str]] = {"script": [], "style": []}
        self.text = ""
        self.policy = ""
        self.inside: str | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.inside = tag if tag in self.blocks else None
        self.links += [value or "" for key, value in attrs if key in ("src", "href")]
        assert "style" not in values
        assert not any(key.startswith("on") for key in values)
        if tag == "img":
            self.pictures.append(values)
        if values.get("http-equiv") == "Content-Security-Policy":
            self.policy = values["content"] or ""

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.blocks[self.inside].append(data)
        else:
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self.inside = None
