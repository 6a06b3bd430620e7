"""What data sets and DICOM headers say about patients and views, in the same words for all of them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping

SEXES = {"f": "F", "female": "F", "w": "F", "m": "M", "male": "M"}
NOBODY = {"nan", "none", "null", "na", "n/a", "<na>", "unknown", "anonymous", "anonymized", "anonymised", "anon"}
REPORT = "report"  # column with the text of an image's report, or the path of a text file
LATERAL = {"L", "LL", "RL", "LATERAL", "LLD", "RLD"}


def patient_key(patient: str, issuer: str = "") -> str:
    """Hash (16 hex digits) of a patient's id; "" for none, or for a word that stands for nobody in particular. No run
    stores the id itself. ``issuer``: the public data set that numbered its patients, whose patient 1 is not patient 1
    of another; empty for ids of a user's own."""
    text = re.sub(r"^(\d+)\.0$", r"\1", patient.strip())  # pandas writes numbers beside empty cells as 3.0
    if text.casefold() in NOBODY:
        return ""
    whole = f"{issuer}:{text}" if issuer else text
    return hashlib.sha256(f"patient:{whole}".encode()).hexdigest()[:16] if text else ""


def described(columns: Mapping[str, str]) -> dict[str, str]:
    """The columns without empty ones; ``age`` in years, ``sex`` F or M, ``view`` PA, AP, LATERAL or as written."""
    known = {name: text for name, value in columns.items() if (text := value.strip())}
    if "sex" in known:
        known["sex"] = SEXES.get(known["sex"].lower(), known["sex"])
    if "age" in known and (match := re.fullmatch(r"0*(\d+)(?:\.0+)?[Yy]?", known["age"])):
        known["age"] = match[1]
    if "view" in known:
        known["view"] = "LATERAL" if known["view"].upper() in LATERAL else known["view"].upper()
    return known


def is_lateral(view: str) -> bool:
    """Whether a view, as data sets write it, is a lateral one."""
    return view.strip().upper() in LATERAL
