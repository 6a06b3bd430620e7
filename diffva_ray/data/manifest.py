"""Reads manifests: tables that name an image and its label in each row, with any further columns."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from diffva_ray.config.recipe import DataConfig
from diffva_ray.config.stages import CONDITION
from diffva_ray.data.boxes import ends
from diffva_ray.data.columns import described, patient_key
from diffva_ray.data.dataset import Dataset, LabelledImage, UnusableData
from diffva_ray.data.listing import Collection, Listing
from diffva_ray.data.tables import Table, read_table
from diffva_ray.schema import PLAN, RECORDS
from diffva_ray.storage.store import Ranges

KIND = "manifest"
LAYOUT = "a .csv, .tsv, .jsonl or .parquet file with path,label"
ROLES = {  # names of columns, without case, with _ for spaces and hyphens; ``data.columns`` names others
    "image": ("path", "image", "image_path", "file", "file_name", "filename", "file_path", "filepath", "image_file",
              "image_index", "image_id", "imageid", "img", "img_path", "dicom", "dicom_path", "dcm_path"),
    "label": ("label", "labels", "class", "finding", "findings", "finding_labels", "diagnosis", "category", "condition",
              "target"),
    "patient": ("patient", "patient_id", "patientid", "subject", "subject_id", "subjectid"),
    "mask": ("mask", "lung_mask", "mask_path"),
    "lesion": ("lesion", "lesion_mask"),
    "caption": ("caption", "text"),
    "view": ("view", "view_position", "viewposition", "projection", "ap/pa"),
    "laterality": ("laterality", "image_laterality"),
    "age": ("age", "patient_age", "patientage"),
    "sex": ("sex", "gender", "patient_sex", "patientsex", "patient_gender"),
    "spacing": ("spacing", "pixel_spacing", "pixelspacing"),
    "split": ("split", "fold", "subset", "partition"),
}  # fmt: skip
NO_LABEL = {"nan", "null", "na", "n/a", "<na>"}  # an empty cell, as programs write it
SEVERAL = re.compile(r"[,;]|^\[")  # in a label: probably several ones, separated otherwise than by |
OF_THE_IMAGE = ("image", "label", "patient", "mask", "lesion", "caption")  # the other roles become columns
RESERVED = {*PLAN.names, *RECORDS.names}  # a further column of such a name gets the prefix data_


@dataclass(frozen=True)
class Outside(Exception):
    """A path that is not below the data root."""

    path: str


def read(listing: Listing, name: str, data: bytes | Ranges) -> Dataset | None:
    """The images of the manifest ``name`` with the content ``data``; None when no column names images or labels.

    An image whose file is absent is kept with size -1; the path of an absent mask is dropped; rows without path or
    label are left out; all of them are counted. Raises UnusableData for paths outside the data root.
    """
    table = read_table(data, name)
    roles = columns_by_role(table, listing.config, name)
    if not {"image", "label"} <= set(roles):
        return None
    images = Collection(listing, "phantoms" if "phantoms.json" in listing.sizes else KIND, f"{name} is a manifest")
    add_rows(images, table, name)
    return Dataset(
        listing.store, images.images, images.kind, images.remarks, why=images.why,
        left_out=[f"{count} {what}" for what, count in images.left_out.items()],
    )  # fmt: skip


def columns_by_role(table: Table, config: DataConfig, name: str) -> dict[str, str]:
    """Column by role: as ``data.columns`` says, else by the names of ROLES. Raises UnusableData."""
    if absent := [column for column in config.columns.values() if column not in table.columns]:
        raise UnusableData(
            f"{name}: has no column {', '.join(absent)} (data.columns); it has {', '.join(table.columns)}"
        )
    folded = {re.sub(r"[\s\-]+", "_", column.strip()).casefold(): column for column in reversed(table.columns)}
    found = {role: next((folded[name] for name in names if name in folded), "") for role, names in ROLES.items()}
    taken = set(config.columns.values())
    return {role: column for role, column in found.items() if column and column not in taken} | config.columns


def add_rows(
    images: Collection, table: Table, name: str, base: str = "", more: Mapping[str, str] | None = None
) -> None:
    """Adds the images of a manifest to a collection. Paths are relative to ``base``, a folder with a slash at its end;
    ``more``: further columns of all images. Without a label column, the label is the image's folder."""
    listing = images.listing
    roles = columns_by_role(table, listing.config, name)
    further = {column: f"data_{column}" if column in RESERVED else column
               for column in table.columns if column not in roles.values()}  # fmt: skip
    further |= {column: role for role, column in roles.items() if role not in OF_THE_IMAGE}
    conditions = [column for column in further if further[column].startswith(CONDITION)]
    outside, absent_images, absent_masks, absent_conditions, several = [], set(), 0, set(), set()
    for where, row in table.rows:
        cell = {role: row[column] for role, column in roles.items()}
        try:
            path = inside(cell["image"], listing)
            masks = {role: inside(cell[role], listing) for role in ("mask", "lesion") if cell.get(role, "").strip()}
            own = {column: base + inside(row[column], listing) for column in conditions if row[column].strip()}
        except Outside as error:
            outside.append((where, error.path))
            continue
        labels = [text for label in cell.get("label", path.split("/")[-2:][0]).split("|")
                  if (text := label.strip()) and text.casefold() not in NO_LABEL]  # fmt: skip
        if not path or not labels:
            images.left_out[f"rows of {name} without {'a label' if path else 'a path'}"] += 1
            continue
        several |= {label for label in labels if SEVERAL.search(label)}
        found = _found(path, base, listing)
        if found is None:
            absent_images.add(path)
        existing = {role: listing.exact(base + mask) for role, mask in masks.items()}
        absent_masks += sum(mask is None for mask in existing.values())
        own = {column: listing.exact(path) or path for column, path in own.items()}
        absent_conditions |= {path for path in own.values() if path not in listing.sizes}
        cells = {**row, **own}
        columns = described({**{new: cells[old] for old, new in further.items()}, **(more or {})})
        images.images += [
            LabelledImage(
                found or base + path, label, -1 if found is None else listing.sizes[found], existing.get("mask") or "",
                existing.get("lesion") or "", caption=" ".join(cell.get("caption", "").split()),
                patient=patient_key(cell.get("patient", "")), columns=columns,
            )
            for label in labels
        ]  # fmt: skip
    if outside:
        raise UnusableData(_outside(outside, listing))
    if several:
        what = f"{len(several)} labels such as {min(several)!r} are one class each; separate labels by |"
        images.remarks.append(what)
    absent = {"images": len(absent_images), "masks": absent_masks, "condition images": len(absent_conditions)}
    _remark(images, table, name, roles, absent)


def _found(path: str, base: str, listing: Listing) -> str | None:
    """The listed image: at the path, or, when the folder or extension is not written, the only one of that name."""
    return listing.exact(base + path) or listing.image(path, path.count("/") + 1)


def _outside(rows: list[tuple[str, str]], listing: Listing) -> str:
    where, path = rows[0]
    more = f" ({len(rows)} such paths)" if len(rows) > 1 else ""
    return f"{where}: {path!r} is outside the folder {listing.store.uri}{more}; give the images' folder with --root"


def _remark(images: Collection, table: Table, name: str, roles: Mapping[str, str], absent: Mapping[str, int]) -> None:
    used = {role: column for role, column in roles.items() if column not in (role, *ROLES[role][:1])}
    if used:
        images.remarks.append(f"columns of {name}: {', '.join(f'{role}={column}' for role, column in used.items())}")
    images.remarks += [f"{count} {what} named in {name} do not exist" for what, count in absent.items() if count]
    if table.unread:
        what = f"columns of {name} that are neither text nor numbers ({', '.join(table.unread)})"
        images.left_out[what] += len(table.unread)


def _below_root(text: str, listing: Listing) -> str | None:
    """The listed file that an absolute path of another machine ends with, the longest end first."""
    if not re.match(r"/|[A-Za-z]:/|\w+://", text) or ".." in text.split("/"):
        return None
    return next((found for end in ends(text)[1:] if (found := listing.exact(end))), None)


def inside(text: str, listing: Listing) -> str:
    """Path from a table, normalised and relative to the data root; "" for an empty one. Raises Outside."""
    if text in listing.sizes:
        return text
    text = text.strip().replace("\\", "/")  # a table written on Windows
    for root in (listing.config.root, listing.store.uri):
        if root and text.startswith(f"{root.rstrip('/')}/"):
            text = text[len(root.rstrip("/")) + 1 :]
    if listing.config.root and (below := _below_root(text, listing)):
        return below
    pure = PurePosixPath(text)
    if pure.is_absolute() or ".." in pure.parts or "\0" in text or re.match(r"[A-Za-z]:/|\w+://", text):
        raise Outside(text)
    return str(pure) if pure.parts else ""
