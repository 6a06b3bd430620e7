"""Captions made of what a data set says about an image: class, place and size of its lesions, age, sex, view, report.

Columns of the data set's table come first (phantoms name all their factors); side, zone, size and count of other data
sets are measured on lesion masks, boxes and lung masks. A caption is a function of its seed and of the image alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from diffva_ray.config.captions import NAMED, CaptionConfig
from diffva_ray.config.recipe import DataConfig
from diffva_ray.data.columns import REPORT, is_lateral
from diffva_ray.data.dataset import LabelledImage
from diffva_ray.data.images import BadImage, decode_square
from diffva_ray.data.labels import plain
from diffva_ray.data.lexicon import SYNONYMS, in_words
from diffva_ray.data.masks import read_mask
from diffva_ray.data.mirroring import other_side
from diffva_ray.data.places import SEVERITIES, SIDES, SIZES, ZONES, place_of
from diffva_ray.data.reports import conclusion, is_file
from diffva_ray.data.shapes import Shape, lesion_mask
from diffva_ray.progress import LOG
from diffva_ray.schema import digest
from diffva_ray.storage.store import Store

UNNAMED = "finding"  # stands for the class
OF_THE_HEART = {plain(label) for label in ("Cardiomegaly", "Enlarged Cardiomediastinum", "Aortic enlargement")}
OF_A_FINDING: dict[str, tuple[str, ...]] = {  # words that columns of the table may have
    "count": (),
    "severity": SEVERITIES,
    "size": SIZES,
    "side": (*SIDES, "bilateral"),
    "zone": ZONES,
}
PERSON = ("age", "sex", "view")
PEOPLE = {"F": "woman", "M": "man"}
OTHER = "{count} {severity} {size} {finding} {place}"  # template of further findings
MANY = 9  # largest number of parts of a lesion mask that is counted
MEASURED_SIZE = 128  # side of the square on which masks are measured, in pixels
Facts = dict[str, str]  # value by name; a name without a value is absent


class Captions:
    """Captions of the images of a data set.

    Args:
        config: Templates and probabilities.
        data: Prompts of the classes.
        store: Where masks and images are.
        images: All images; several labels of one path are several findings of one image.
        shapes: Outlined lesions by image path.
        fits: Whether the tokenizer takes a text whole; a report is cut after the last sentence with which it does.
    """

    def __init__(
        self,
        config: CaptionConfig,
        data: DataConfig,
        store: Store,
        images: Sequence[LabelledImage],
        shapes: Mapping[str, list[Shape]],
        fits: Callable[[str], bool] = lambda text: True,
    ) -> None:
        self.config, self.data, self.store, self.shapes, self.fits = config, data, store, shapes, fits
        self.of_file: dict[tuple[str, bool], list[LabelledImage]] = {}
        for image in images:
            self.of_file.setdefault((image.path, image.mirrored), []).append(image)
        self._measured: dict[tuple[str, str], Facts] = {}
        self._reports: dict[str, list[str]] = {}

    def caption(self, image: LabelledImage, *seed: object) -> str:
        """The caption of an image; ``seed`` are plain values, such as the training's seed and the step."""
        prompt = self.data.prompt(image.label)
        rng = np.random.default_rng(int(digest([*seed, image.path, image.label])[:16], 16))
        if rng.random() < self.config.bare:
            return prompt
        findings = self._known(image, self._measure)
        if image.label != self.data.healthy_class and rng.random() < self.config.unnamed:
            findings[0]["finding"] = UNNAMED
        template = self.config.templates[int(rng.integers(len(self.config.templates)))]
        patient, first, *others = (
            self._chosen(facts, rng) for facts in (person(image.columns, self.config.numbers), *findings)
        )
        others = [facts for facts in others if rng.random() >= self.config.dropout]
        values = {**patient, **_placed(first), "other": _others([_placed(facts) for facts in others])}
        told = REPORT in NAMED.findall(template) and rng.random() >= self.config.dropout
        sentences = self._report(image) if told else []
        state = rng.bit_generator.state
        while True:
            parts = filled(template, {**values, REPORT: ". ".join(sentences)})
            rng.bit_generator.state = state  # the same order for each number of sentences
            if self.config.shuffle:
                parts = [parts[n] for n in rng.permutation(len(parts))]
            text = ", ".join(parts)
            if not sentences or self.fits(text):
                return text
            sentences = sentences[:-1]

    def findings(self, image: LabelledImage) -> list[tuple[str, str]]:
        """Label and side ("" for unknown) of each finding of an image; none for a healthy one."""
        labels = [image.label, *(other.label for other in self._others(image))]
        labels += [second] if (second := image.columns.get("second", "")) else []
        facts = self._known(image, self._measure)
        pairs = zip(labels, facts, strict=False)
        return [(label, of.get("side", "")) for label, of in pairs if label != self.data.healthy_class]

    def _known(self, image: LabelledImage, measure: Callable[[LabelledImage], Facts]) -> list[Facts]:
        """What is known of the findings of an image, the one of its label first; ``measure``: of masks and boxes."""
        facts = [self._finding(image, measure)]
        facts += [self._finding(other, measure) for other in self._others(image)]
        if second := image.columns.get("second", ""):
            facts.append({"finding": self.data.prompt(second), **self._told(image, "second_")})
        return facts[: self.config.findings]

    def _others(self, image: LabelledImage) -> list[LabelledImage]:
        """The image under its other labels."""
        same = self.of_file.get((image.path, image.mirrored), ())
        return [other for other in same if other.label != image.label]

    def _finding(self, image: LabelledImage, measure: Callable[[LabelledImage], Facts]) -> Facts:
        """What is known of the finding of a label: from the table, else from masks and boxes."""
        facts = {"finding": self.data.prompt(image.label)}
        if image.label == self.data.healthy_class:
            return facts
        return facts | (self._told(image) or _seen(image, measure(image)))

    def _told(self, image: LabelledImage, prefix: str = "") -> Facts:
        """What the table says of a finding; other values in columns of these names, such as a size in bytes, do not
        count."""
        facts = {}
        for name, words in OF_A_FINDING.items():
            value = image.columns.get(prefix + name, "").strip().casefold()
            if name == "count" and re.fullmatch(r"\d{1,2}", value):
                value = self._count(int(value))
            elif value not in words:
                continue
            if value:
                facts[name] = value
        return facts

    def _measure(self, image: LabelledImage) -> Facts:
        """Side, zone, size and count by lesion mask or boxes; nothing for the heart, lateral views and without any."""
        key = (image.path, image.label)
        if key in self._measured:
            return self._measured[key]
        facts: Facts = {}
        lateral = is_lateral(image.columns.get("view", ""))
        if plain(image.label) not in OF_THE_HEART and not lateral and (lesion := self._lesion(image)) is not None:
            lungs = read_mask(self.store, image.lung_mask, MEASURED_SIZE) if image.lung_mask else None
            if (place := place_of(lesion, lungs)) is not None:
                found = {"side": place.side, "zone": place.zone, "size": place.size}
                found["count"] = self._count(len(self._shapes(image)) or min(place.count, MANY))
                facts = {name: value for name, value in found.items() if value}
        self._measured[key] = facts
        return facts

    def _report(self, image: LabelledImage) -> list[str]:
        """The sentences of an image's report; none, with a warning, for a file that cannot be read."""
        told = image.columns.get(REPORT, "")
        if told not in self._reports:
            text = told
            if is_file(told):
                try:
                    text = self.store.read(told).decode("utf-8", "replace")
                except (OSError, ValueError) as error:
                    reason = "no such file" if isinstance(error, FileNotFoundError) else error
                    LOG.warning("report %s of %s: %s; its captions do without", told, image.path, reason)
                    text = ""
            self._reports[told] = conclusion(text)
        sentences = self._reports[told]
        return [other_side(text) for text in sentences] if image.mirrored and is_file(told) else sentences

    def _count(self, number: int) -> str:
        """A number of lesions as a phrase: "3 areas of"; "" for one."""
        return f"{in_words(number) if self.config.numbers == 'words' else number} areas of" if number > 1 else ""

    def _shapes(self, image: LabelledImage) -> list[Shape]:
        return [shape for shape in self.shapes.get(image.path, ()) if shape.label in ("", image.label)]

    def _lesion(self, image: LabelledImage) -> NDArray[np.bool_] | None:
        if image.lesion_mask:
            return read_mask(self.store, image.lesion_mask, MEASURED_SIZE)
        shapes = self._shapes(image)
        if not shapes:
            return None
        width, height = 0, 0
        if any(not shape.width or not shape.height for shape in shapes):  # drawn on the file as it is
            try:
                height, width = decode_square(self.store.read(image.path), MEASURED_SIZE)[1]
            except (BadImage, OSError):
                return None
        return lesion_mask(shapes, width, height, MEASURED_SIZE)

    def _chosen(self, facts: Facts, rng: np.random.Generator) -> Facts:
        """The facts without those that are dropped, and with synonyms. Every fact takes its random numbers."""
        chosen = {}
        for name, value in facts.items():
            dropped, replaced, which = rng.random(3)
            others = SYNONYMS.get(value.casefold(), ())
            if others and replaced < self.config.synonyms:
                value = others[int(which * len(others))]
            if name == "finding" or dropped >= self.config.dropout:
                chosen[name] = value
        return chosen

    def longest(self, length: Callable[[str], int]) -> str:
        """A caption at least as long as any that these images can have, by ``length`` in tokens; reads no mask."""

        def wordy(facts: Facts) -> Facts:
            """The facts by their longest synonyms."""
            others = SYNONYMS if self.config.synonyms else {}
            return {name: max((value, *others.get(value.casefold(), ())), key=length) for name, value in facts.items()}

        images = [image for group in self.of_file.values() for image in group]
        described = []
        for findings in map(json.loads, sorted({json.dumps(self._known(image, self._widest)) for image in images})):
            first, *others = map(wordy, findings)
            described.append({**_placed(first), "other": _others([_placed(facts) for facts in others])})
        people = [person(dict(columns), self.config.numbers) for columns in {_who(image) for image in images}]
        patient = {name: max((wordy(facts).get(name, "") for facts in people), key=length) for name in PERSON}
        templates = self.config.templates
        captions = {", ".join(filled(template, facts | patient)) for template in templates for facts in described}
        return max(sorted(captions), key=length)

    def _widest(self, image: LabelledImage) -> Facts:
        """What ``_measure`` could say of an image at most."""
        boxes = len(self._shapes(image))
        if not boxes and not image.lesion_mask:
            return {}
        return {"side": "right", "zone": "middle", "size": "medium", "count": self._count(boxes or MANY)}


def _seen(image: LabelledImage, facts: Facts) -> Facts:
    """What was measured on an image's files, as it is in the image: its mirror image shows the other side."""
    return {name: other_side(value) for name, value in facts.items()} if image.mirrored else facts


def _who(image: LabelledImage) -> tuple[tuple[str, str], ...]:
    return tuple((name, image.columns.get(name, "")) for name in PERSON)


def person(columns: Mapping[str, str], numbers: str) -> Facts:
    """Age, sex and view of the table in words."""
    facts: Facts = {}
    if re.fullmatch(r"\d{1,3}", age := columns.get("age", "")):
        facts["age"] = f"{in_words(int(age)) if numbers == 'words' and int(age) < 200 else int(age)} year old"
    if (sex := columns.get("sex", "")) in PEOPLE:
        facts["sex"] = PEOPLE[sex]
    if view := columns.get("view", "").strip():
        facts["view"] = view if view in ("AP", "PA") else view.lower()
    return facts


def placed(facts: Facts) -> str:
    """Side and zone as a phrase: "in the left upper zone", "on the left", "in the upper zone", "bilateral"."""
    side, zone = facts.get("side", ""), facts.get("zone", "")
    if side in ("left", "right"):
        return f"in the {side} {zone} zone" if zone else f"on the {side}"
    return " ".join(filter(None, [side, f"in the {zone} zone" if zone else ""]))


def _placed(facts: Facts) -> Facts:
    return {**facts, "place": placed(facts)}


def _others(findings: Sequence[Facts]) -> str:
    """Further findings as a phrase: "and large Mass on the left"."""
    return " ".join(f"and {filled(OTHER, facts)[0]}" for facts in findings)


def filled(template: str, values: Mapping[str, str]) -> list[str]:
    """The parts of a template between commas, with values for its names, without parts in which no name has one."""
    parts = []
    for part in template.split(","):
        names = NAMED.findall(part)
        if names and not any(values.get(name) for name in names):
            continue
        text = NAMED.sub(lambda match: values.get(match[1], ""), part)
        parts.append(" ".join(text.split()))
    return [part for part in parts if part]


def trained_texts(data: DataConfig) -> set[str]:
    """The prompts of the classes, and the words that captions can have besides numbers."""
    texts = set(data.prompts.values())
    if data.captions is not None:
        words = {"left", "right", "bilateral", *ZONES, *SIZES, *SEVERITIES, UNNAMED, *PEOPLE.values()}
        texts |= words | {"areas of", "in on the zone and year old", "ap", "pa"}
        texts |= {text for group in SYNONYMS.values() for text in group}
        texts |= {NAMED.sub(" ", template) for template in data.captions.templates}
    return texts
