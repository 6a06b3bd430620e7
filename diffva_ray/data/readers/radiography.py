"""Reads the layout of the COVID-19 Radiography Database and of phantom sets: ``<class>/images/*.png``.

A class may also have ``masks`` (lungs), ``lesions`` and ``ground_truth`` (counterfactuals), with files of the same
name, and ``changes`` (phantoms with one factor replaced). The data root is the folder of the classes, or the folder
above it (as Kaggle unpacks it). Folder names:
https://www.kaggle.com/datasets/tawsifurrahman/covid19-radiography-database
"""

from __future__ import annotations

from diffva_ray.data.dataset import Dataset, LabelledImage, UnusableData
from diffva_ray.data.listing import Listing, incomplete, top_folders

KIND = "radiography"
LAYOUT = "<class>/images/*.png (Radiography Database, phantoms)"
KAGGLE_NAME = "COVID-19_Radiography_Dataset"
CLASSES = ("COVID", "Lung_Opacity", "Normal", "Viral Pneumonia")
COMPANIONS = ("masks", "lesions", "ground_truth", "changes")


def read(listing: Listing) -> Dataset | None:
    """The images of the layout, or None for another layout. Raises UnusableData for a folder with several such sets."""
    # group the images by the folder of their data set
    roots: dict[str, list[LabelledImage]] = {}  # "" or one folder -> its images
    others: list[str] = []
    for entry in listing.images:
        *above, name, folder, _ = ("", "", *entry.path.split("/"))  # padded, so that short paths unpack as well
        above = [part for part in above if part]
        if folder == "images" and name and len(above) <= 1:
            roots.setdefault("/".join(above), []).append(LabelledImage(entry.path, name, entry.size))
        elif folder not in COMPANIONS:
            others.append(entry.path)
    if not roots:
        return None
    # choose the data set, and note which images are ignored
    root = _choose(listing, list(roots))
    prefix = f"{root}/" if root else ""
    others += [image.path for other in roots if other != root for image in roots[other]]
    left_out = [f"{len(others)} images outside the layout ({top_folders(others)})"] if others else []
    kind = "phantoms" if f"{prefix}phantoms.json" in listing.sizes else KIND
    why = f"folders {prefix}<class>/images"
    shipped = KAGGLE_NAME in (root, listing.store.uri.rstrip("/").rpartition("/")[2])
    remarks = _missing(listing, prefix, roots[root]) if shipped and kind == KIND else []
    return Dataset(listing.store, roots[root], kind, remarks, why=why, left_out=left_out)


def _missing(listing: Listing, prefix: str, images: list[LabelledImage]) -> list[str]:
    """Remarks about classes and masks that the host's archive has."""
    there = {image.label for image in images}
    masked = {
        path[len(prefix) :].split("/")[0] for path in listing.sizes if path.startswith(prefix) and "/masks/" in path
    }
    parts = {
        "images": ([name for name in CLASSES if name not in there], "these classes are left out"),
        "masks": ([name for name in CLASSES if name in there - masked], "maps are scored in the whole image"),
    }
    return [incomplete(", ".join(f"{name}/{part}" for name in names), cost)
            for part, (names, cost) in parts.items() if names]  # fmt: skip


def _choose(listing: Listing, roots: list[str]) -> str:
    for root in ("", KAGGLE_NAME):
        if root in roots:
            return root
    if len(roots) > 1:
        raise UnusableData(f"{listing.store.uri}: has several data sets ({', '.join(sorted(roots))}); give one of them")
    return roots[0]
