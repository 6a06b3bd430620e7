"""Radiology reports as text for captions: what a report concludes, sentence by sentence."""

from __future__ import annotations

import re

_HEADING = re.compile(r"^[ \t]*([A-Z][A-Z /()]{3,40}):", re.MULTILINE)
SECTIONS = ("IMPRESSION", "CONCLUSION", "OPINION", "FINDINGS")  # the first that is there speaks for the report
_DELETED = re.compile(r"_{2,}|\[\*\*.*?\*\*\]|\bXXXX\b")  # in place of names: MIMIC-CXR, MIMIC-III, Open-i
_NUMBER = re.compile(r"^\s*(?:\d{1,2}[.)]|[-*•])\s+")


def conclusion(report: str) -> list[str]:
    """The sentences of a report's impression; of its findings, or of all of it, where it has none.

    Headings, list numbers and the marks of deleted names are left out.

    >>> conclusion("FINDINGS: Heart is normal.\\n\\nIMPRESSION:\\n1. Left lower lobe\\n pneumonia.\\n2. No effusion.")
    ['Left lower lobe pneumonia', 'No effusion']
    """
    headings = list(_HEADING.finditer(report))
    ends = [heading.start() for heading in headings[1:]] + [len(report)]
    parts = {heading[1].strip(): report[heading.end() : end] for heading, end in zip(headings, ends, strict=False)}
    text = next((parts[name] for name in SECTIONS if parts.get(name, "").strip()), None)
    if text is None:
        text = _HEADING.sub("", report)
    lines = [_NUMBER.sub("\0", line) for line in _DELETED.sub("", text).splitlines()]  # a list's entry is a sentence
    entries = " ".join(lines).replace("\0", ". ")
    sentences = [" ".join(sentence.split()) for sentence in re.split(r"(?<=[.!?])\s+", entries)]
    return [bare for sentence in sentences if (bare := sentence.strip(" .!?;:,"))]


def is_file(report: str) -> bool:
    """Whether a column ``report`` is the path of a text file."""
    return report.endswith(".txt") and " " not in report
