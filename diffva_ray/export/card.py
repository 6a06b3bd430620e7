"""The data card of an export, ``README.md``: what a hub shows, with the header that ``datasets`` reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from diffva_ray.evaluate.credibility import stated
from diffva_ray.evaluate.records import reduced_metrics
from diffva_ray.evaluate.report.numbers import glance, interval, is_overall, number
from diffva_ray.export.acceptance import Rule
from diffva_ray.export.contents import Contents
from diffva_ray.export.formats import Format
from diffva_ray.export.selection import Counts
from diffva_ray.generate.run import Run
from diffva_ray.model.hub_card import CITATION
from diffva_ray.schema import MEANINGS

SIZES = ((1e3, "n<1K"), (1e4, "1K<n<10K"), (1e5, "10K<n<100K"), (1e6, "100K<n<1M"), (1e7, "1M<n<10M"))  # the hub's
TAGS = ["medical", "chest-x-ray", "counterfactual-explanation", "attribution", "synthetic", "diffva-ray"]
PHANTOM_LICENSE = "apache-2.0"
IMAGES = {
    "image": "the input at the resolution of the run, 8-bit grey",
    "counterfactual": "**synthetic**: the healthy counterfactual, 8-bit grey",
    "reconstruction": "the autoencoder's version of the input, 8-bit grey",
    "ground_truth": "the ground-truth counterfactual; null where it is unknown",
    "lesion_mask": "the lesions that the data set knows, 0 and 255; null where they are unknown",
    "lung_mask": "the lung mask, likewise",
    "attribution": "the signed attribution map, float32 in [-1, 1]",
}
SETTINGS = ("method", "scheduler", "strength", "guidance_scale", "num_inference_steps", "prompt", "seed", "sweep")


@dataclass(frozen=True)
class Choice:
    """Which records an export holds."""

    counts: Counts
    rule: Rule
    best_of: str  # score by which the best sample of an image is chosen; empty: all samples
    shares: Mapping[str, float] | None  # of the splits; None: the data set's own

    @property
    def all(self) -> bool:
        return not (self.rule.text or self.best_of)


def card(contents: Contents, name: str, shape: Format, choice: Choice, license_id: str) -> str:
    """The card. ``name``: of the format. No path of the machine is in it."""
    counts = choice.counts
    run = contents.run
    sections = [
        ("", _introduction(run, counts)),
        ("Load it", _loading(contents, shape, counts)),
        ("Contents", _contents(contents, name)),
        ("Splits", _splits(counts, choice.shares)),
        *([] if choice.all else [("Accepted records", _gate(choice))]),
        ("How it was made", _making(run)),
        ("Results of the whole run", _results(run)),
        ("Limits", _limits(contents)),
        ("Licence and source", _source(run, license_id)),
        ("Citation", f"```bibtex\n{CITATION}\n```\n\nCite the source data set, too, as its hosts ask."),
        ("Columns", _columns(contents)),
    ]
    text = "\n\n".join(f"## {title}\n\n{body}" if title else body for title, body in sections)
    return f"---\n{yaml.safe_dump(_header(run, name, shape, counts, license_id), sort_keys=False)}---\n\n{text}\n"


def _header(run: Run, name: str, shape: Format, counts: Counts, license_id: str) -> dict[str, Any]:
    """The YAML header, in the words of the hub."""
    header: dict[str, Any] = {
        "pretty_name": f"Counterfactuals and attribution maps of chest X-rays ({run.fingerprint})",
        "license": license_of(run, license_id),
        "task_categories": ["image-to-image", "image-segmentation"],
        "tags": TAGS,
        "size_categories": [next((size for most, size in SIZES if counts.accepted < most), "n>10M")],
    }
    if name != "coco":  # which ``datasets`` does not read
        files = [{"split": split, "path": f"{shape.folder}/{split}-*.{shape.suffix}"} for split in counts.splits]
        header["configs"] = [{"config_name": "default", "data_files": files}]
    return header


def license_of(run: Run, license_id: str) -> str:
    """The licence as the hub names it: the given one, else that of phantoms, else ``other``."""
    return license_id or (PHANTOM_LICENSE if _phantoms(run) else "other")


def _phantoms(run: Run) -> bool:
    return run.about.get("data_kind") == "phantoms"


def _introduction(run: Run, counts: Counts) -> str:
    of = "synthetic phantoms, which are drawings and not patients," if _phantoms(run) else "chest X-rays"
    return (
        f"# Healthy counterfactuals and attribution maps\n\n{counts.accepted} records of {of} with a generated healthy "
        "version of each image (the counterfactual) and a signed map of the difference (the attribution map). Made "
        "with diffva-ray.\n\n> **Not for clinical use.** Counterfactuals and reconstructions are **synthetic images**. "
        "They are no images of patients; do not use them for a diagnosis, and do not mix them with clinical images."
    )


def _loading(contents: Contents, shape: Format, counts: Counts) -> str:
    code = shape.loading.replace("SPLIT", next(iter(counts.splits))).replace("SIZE", str(contents.size))
    return f"`DIR` is the folder of this file.\n\n```python\n{code}\n```"


def _contents(contents: Contents, name: str) -> str:
    if name == "coco":
        return (
            "The category `attribution` holds the connected regions of each map (inside the lungs, where these are "
            f"known) above the threshold {contents.threshold:g}, with the largest value of the map as `score`. The "
            "category `lesion` holds the lesions that the data set knows. Segmentations are compressed RLE on the "
            f"image squashed to {contents.size} x {contents.size} px. Each image has its columns under `record`."
        )
    if name == "dicom":
        lesion = "a second segment is the lesion that the data set knows"
        rows = [
            ("`image_dicom`", "secondary capture: " + IMAGES["image"]),
            ("`counterfactual_dicom`", "secondary capture: " + IMAGES["counterfactual"]),
            ("`attribution_dicom`", "parametric map: " + IMAGES["attribution"]),
            ("`segmentation_dicom`", f"segmentation: the map above the threshold {contents.threshold:g}; {lesion}"),
        ]
        rows = rows if contents.with_images else rows[1:]
        plane = "The planes of maps and segmentations are nominal: a projection has no position in space."
        return f"{_table(('column with the path', 'object'), rows)}\n\n{plane}"
    rows = [(f"`{key}`", IMAGES[key]) for key in (*contents.images, "attribution")]
    left_out = "" if contents.with_images else (
        "\n\nThe source images, and what shows them, are left out. `image_path` and `image_sha256` name the file in "
        "the source data set."
    )  # fmt: skip
    size = f"All are {contents.size} x {contents.size} px; images are squashed to the square, not cropped."
    return f"{_table(('feature', 'meaning'), rows)}\n\n{size}{left_out}"


def _columns(contents: Contents) -> str:
    meanings = ((f"`{key}`", MEANINGS.get(name, "of the data set's table")) for name, key in contents.names.items())
    return _table(("column", "meaning"), meanings)


def _splits(counts: Counts, shares: Mapping[str, float] | None) -> str:
    table = _table(("split", "records"), [(name, str(n)) for name, n in counts.splits.items()])
    if shares is not None:
        return f"{table}\n\nAll records of a patient are in one split; where the patient is unknown, all of an image."
    shared = counts.shared_patients
    warning = f" **{shared} patients have records in several of them.**" if shared else " No patient is in two of them."
    return f"{table}\n\nThe splits are the source data set's own.{warning}"


HEADS = ("class", "records", "accepted", "rate", "mean SSIM", "attribution in lungs", "flip rate")


def acceptance(counts: Counts) -> list[tuple[str, ...]]:
    """The acceptance rate by class and its effect on the numbers (all records → accepted ones), as in HEADS."""
    rows = []
    for label, of in sorted(counts.classes.items()):
        all_of, chosen = of.all, of.accepted
        effects = (
            (all_of.ssim, all_of.records, chosen.ssim, chosen.records),
            (all_of.in_lungs, all_of.with_lungs, chosen.in_lungs, chosen.with_lungs),
            (all_of.flipped, all_of.called_abnormal, chosen.flipped, chosen.called_abnormal),
        )
        texts = (f"{_mean(total, n)} → {_mean(accepted, m)}" for total, n, accepted, m in effects)
        rate = f"{100 * chosen.records / all_of.records:.1f} %"
        rows.append((label, str(all_of.records), str(chosen.records), rate, *texts))
    return rows


def _mean(total: float, n: int) -> str:
    return number(total / n) if n else "–"


def _gate(choice: Choice) -> str:
    text = []
    if choice.rule.text:
        text.append(f"Only records with `{choice.rule.text}` are here.")
    if choice.best_of:
        text.append(f"Of the samples of an image, only the one with the best `{choice.best_of}` is here.")
    text.append(
        "Arrows lead from all records to the accepted ones; `rejected.parquet` says why the others are not here."
    )
    warning = "Numbers below are of the whole run, before the choice."
    if judged(choice.rule):
        warning = f"**The rule reads the judge, so the flip rate of the accepted records is no evidence.** {warning}"
    return f"{' '.join(text)}\n\n{_table(HEADS, acceptance(choice.counts))}\n\n{warning}"


def judged(rule: Rule) -> bool:
    """Whether a rule selects by the judge."""
    return any(column.startswith("judge_") for column in rule.columns)


def _making(run: Run) -> str:
    about, keys = run.about, run.keys
    rows = [
        ("recipe", run.recipe.name),
        *((key, str(keys[key])) for key in SETTINGS if keys.get(key) not in (None, [])),
    ]
    rows += [
        ("model", f"`{_last(about.get('model'))}`, digest `{keys['model_digest']}`"),
        ("run", f"fingerprint `{run.fingerprint}`"),
        (
            "software",
            f"diffva-ray {about.get('diffva_ray', '')} ({about.get('code_revision', '')}), torch {keys['torch']}",
        ),
    ]
    return _table(("", ""), rows)


def _results(run: Run) -> str:
    """The numbers with their intervals, or why there are none."""
    metrics = reduced_metrics(run)
    problems = stated(run, metrics)
    if metrics is None or problems:
        return "\n".join(f"- **{problem}**" for problem in problems) or "No numbers are stated."
    rows = []
    for table, key, title in (
        ("ssim", "ssim", "SSIM of image and counterfactual"),
        ("localization", "auroc", "AUROC of the attribution map against known lesions"),
        ("validity", "flip_rate", "flip rate by the model's own judge"),
        ("ground_truth", "ssim", "SSIM of counterfactual and ground truth"),
    ):
        for row in metrics.get(table, []):
            if row.get("map", "positive") == "positive" and row.get(key) is not None:
                label = "all classes" if is_overall(row["label"]) else row["label"]
                values = (number(row[key]), interval(row.get(f"{key}_interval")), str(row["n"]))
                rows.append((title, label, *values))
    for row in metrics.get("fid", []):
        title = "distance of stand-in features (not FID)" if row["is_stand_in"] else "FID"
        sets, n = f"{row['set1']}, {row['set2']}", f"{row['n1']}, {row['n2']}"
        rows.append((title, sets, number(row["value"]), interval(row.get("interval")), n))
    table = _table(("measure", "class or sets", "value", "95 % interval", "n"), rows)
    return "\n\n".join([*glance(metrics), table, *(f"Note: {note}." for note in metrics.get("notes", []))])


def _limits(contents: Contents) -> str:
    limits = [
        "A counterfactual is one possible healthy version, not the patient's own healthy state.",
        "An attribution map shows what the model changes. It proves no finding, and its absence no health.",
        "The maps were not validated by radiologists on these records.",
        "The map is a difference of images: with the counterfactual it gives back an approximation of the source image"
        + ("." if contents.with_images else ", although that image is left out."),
    ]
    if _phantoms(contents.run):
        limits.insert(
            0, "Phantoms are drawings without X-ray physics; results on them do not predict results on patients."
        )
    return "\n".join(f"- {limit}" for limit in limits)


def _source(run: Run, license_id: str) -> str:
    name = (
        "phantoms of diffva-ray" if _phantoms(run) else f"{_last(run.about['data'])} ({run.about.get('data_kind', '')})"
    )
    if license_id:
        terms = f"This export: `{license_id}`, as its publisher states."
    elif _phantoms(run):
        terms = f"`{PHANTOM_LICENSE}`, as the software."
    else:
        terms = "**Not stated.** The source data set's terms apply to everything derived from its images."
    return f"Source images: {name}. {terms}"


def _last(address: Any) -> str:
    return str(address or "").rstrip("/").rpartition("/")[2]


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table; cells may hold any text."""
    lines = [list(heads), ["---"] * len(list(heads)), *rows]
    return "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
