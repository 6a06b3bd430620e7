"""Synonyms of radiology, for captions.

Findings: preferred names and synonyms of RadLex (RSNA, https://radlex.org) and terms of the Fleischner Society's
glossary (Hansell et al. 2008), written down from memory and not copied from a release; other words: everyday English.
Every line means the same finding or the same degree, so that a synonym never changes what a caption says.
"""

from __future__ import annotations

SYNONYMS: dict[str, tuple[str, ...]] = {
    # findings, by the prompt of the class without case
    "normal chest scan": ("normal chest x ray", "healthy chest", "no abnormal finding"),
    "lung opacity": ("opacity of the lung", "pulmonary opacity"),
    "covid 19": ("covid 19 pneumonia",),
    "viral pneumonia": ("pneumonia of viral cause",),
    "cardiomegaly": ("enlarged heart", "heart enlarged"),
    "pneumothorax": ("air in the pleural space",),
    "mass": ("lung mass", "pulmonary mass"),
    "nodule": ("lung nodule", "pulmonary nodule"),
    "effusion": ("pleural effusion", "pleural fluid"),
    "pleural effusion": ("effusion", "pleural fluid"),
    "edema": ("oedema", "pulmonary edema"),
    "atelectasis": ("collapse of the lung",),
    "consolidation": ("airspace consolidation",),
    "infiltration": ("infiltrate",),
    "fibrosis": ("pulmonary fibrosis",),
    "fracture": ("bone fracture",),
    # degrees, sizes and places
    "mild": ("slight", "minor"),
    "severe": ("marked",),
    "small": ("little",),
    "large": ("big",),
    "bilateral": ("on both sides", "left and right"),
    # patients and views
    "man": ("male",),
    "woman": ("female",),
    "ap": ("ap view", "anteroposterior"),
    "pa": ("pa view", "posteroanterior"),
}
ONES = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen
nineteen
""".split()
TENS = ("", "", *"twenty thirty forty fifty sixty seventy eighty ninety".split())


def in_words(number: int) -> str:
    """A number from 0 to 199 in English words, as in "one hundred five"."""
    if number >= 100:
        return "one hundred" + (f" {in_words(number - 100)}" if number > 100 else "")
    if number < 20:
        return ONES[number]
    return TENS[number // 10] + (f" {ONES[number % 10]}" if number % 10 else "")
