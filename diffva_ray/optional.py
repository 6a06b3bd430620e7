"""Packages that one feature needs and a plain installation lacks; the extras of pyproject.toml bring them."""

from __future__ import annotations


def missing(package: str, what: str, extra: str) -> str:
    """The line that says what ``package`` is needed for and how it is installed, for the exception of the caller."""
    return f"{package} is needed for {what}: pip install diffva-ray[{extra}]"
