"""One name per class: spellings that differ in case, spaces or underscores, and radiological synonyms, are unified."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace

from diffva_ray.config.recipe import DataConfig
from diffva_ray.data.dataset import Dataset
from diffva_ray.data.listing import nfc

HEALTHY = ("Normal", "No Finding", "No Findings", "Healthy", "Normal Chest", "Normal Chest X-Ray", "No Disease",
           "gesund", "Normalbefund", "ohne Befund", "sain", "sano", "sana", "saludable", "saudável")  # fmt: skip
SYNONYMS = (  # every line is one class; compared by ``plain``
    ("COVID", "COVID 19", "SARS-CoV-2", "2019-nCoV", "COVID 19 Pneumonia"),
    ("Lung Opacity", "Opacity", "Airspace Opacity", "Lung Opacities"),
    ("Viral Pneumonia", "Pneumonia Viral", "Pneumonia/Viral"),
    ("Pleural Effusion", "Effusion", "Pleural Effusions"),
    ("Infiltration", "Infiltrate", "Infiltrates"),
    ("Edema", "Oedema", "Pulmonary Edema", "Lung Edema"),
    ("Nodule", "Lung Nodule", "Pulmonary Nodule"),
    ("Mass", "Lung Mass", "Pulmonary Mass"),
    ("Fibrosis", "Pulmonary Fibrosis"),
    ("Enlarged Cardiomediastinum", "Widened Mediastinum"),
)


def plain(label: str) -> str:
    """A label without case, spaces, underscores and hyphens, and with Unicode composed."""
    return re.sub(r"[\s_\-]+", "", nfc(label)).casefold()


GROUPS = {plain(label): plain(group[0]) for group in SYNONYMS for label in group}
HEALTHY_GROUP = {plain(label) for label in HEALTHY}


def unified(dataset: Dataset, config: DataConfig) -> Dataset:
    """The data set with one name per class, and a remark for every name that was changed.

    Synonyms of healthy become ``config.healthy_class``; other labels the recipe's name of the class
    (``config.prompts``), else the spelling that most images of the data set have. Names of the recipe stay.
    """
    healthy = HEALTHY_GROUP | {plain(config.healthy_class)}

    def key(label: str) -> str:
        return "healthy" if plain(label) in healthy else GROUPS.get(plain(label), plain(label))

    # the name of every class
    counts = Counter(image.label for image in dataset.images)
    for shape in (shape for shapes in dataset.shapes.values() for shape in shapes if shape.label):
        counts.setdefault(shape.label, 0)
    names: dict[str, str] = {}
    for label in sorted(counts, key=lambda label: (-counts[label], label)):
        names.setdefault(key(label), label)
    names |= {key(label): label for label in config.prompts if key(label) in names}
    names["healthy"] = config.healthy_class
    # rename
    renamed = {label: names[key(label)] for label in sorted(counts)
               if label != names[key(label)] and label not in config.prompts}  # fmt: skip
    if not renamed:
        return dataset
    remarks = [f"{', '.join(f'{old!r} is class {new!r}' for old, new in renamed.items() if counts[old])}"]
    images = [
        replace(image, label=renamed[image.label]) if image.label in renamed else image for image in dataset.images
    ]
    shapes = {
        path: [replace(shape, label=renamed.get(shape.label, shape.label)) for shape in found]
        for path, found in dataset.shapes.items()
    }
    return replace(dataset, images=images, shapes=shapes, remarks=[*dataset.remarks, *filter(None, remarks)])
