"""Where an export comes from: ``lineage.json`` (data → model → run → export) and Croissant metadata."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from diffva_ray.export.contents import Contents
from diffva_ray.export.formats import Format
from diffva_ray.export.selection import Counts
from diffva_ray.generate.run import Run
from diffva_ray.schema import MEANINGS, digest

CONTEXT = {  # of Croissant 1.0, as its specification gives it
    "@language": "en", "@vocab": "https://schema.org/", "citeAs": "cr:citeAs", "column": "cr:column",
    "conformsTo": "dct:conformsTo", "cr": "http://mlcommons.org/croissant/", "rai": "http://mlcommons.org/croissant/RAI/",
    "data": {"@id": "cr:data", "@type": "@json"}, "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/", "examples": {"@id": "cr:examples", "@type": "@json"}, "extract": "cr:extract",
    "field": "cr:field", "fileProperty": "cr:fileProperty", "fileObject": "cr:fileObject", "fileSet": "cr:fileSet",
    "format": "cr:format", "includes": "cr:includes", "isLiveDataset": "cr:isLiveDataset", "jsonPath": "cr:jsonPath",
    "key": "cr:key", "md5": "cr:md5", "parentField": "cr:parentField", "path": "cr:path", "recordSet": "cr:recordSet",
    "references": "cr:references", "regex": "cr:regex", "repeated": "cr:repeated", "replace": "cr:replace",
    "sc": "https://schema.org/", "separator": "cr:separator", "source": "cr:source", "subField": "cr:subField",
    "transform": "cr:transform", "samplingRate": "cr:samplingRate", "equivalentProperty": "cr:equivalentProperty",
}  # fmt: skip
ENCODINGS = {"parquet": "application/x-parquet", "tar": "application/x-tar", "json": "application/json"}
CITATION = "https://doi.org/10.1038/s41598-024-81646-x"  # the paper


def lineage(run: Run, about: Mapping[str, Any], counts: Counts) -> dict[str, Any]:
    """Digests from the data set to the export. No path of the machine is in them."""
    judge = run.about.get("judge")
    return {
        "data": {
            "kind": run.about.get("data_kind"),
            "name": str(run.about["data"]).rstrip("/").rpartition("/")[2],
            "images": len(counts.images),
            "digest": counts.images_digest,
        },
        "model": {
            "name": str(run.about.get("model", "")).rstrip("/").rpartition("/")[2],
            "digest": run.keys["model_digest"],
            "judge": None if judge is None else digest(judge),
        },
        "run": {
            "fingerprint": run.fingerprint,
            "files": about["files"],
            "recipe": run.recipe.name,
            "diffva_ray": run.about.get("diffva_ray"),
            "code_revision": run.about.get("code_revision"),
            "started": run.about.get("started"),
        },
        "export": {"digest": digest(about), "records": counts.accepted, **about},
    }


def croissant(contents: Contents, shape: Format, about: Mapping[str, Any], license_id: str) -> dict[str, Any]:
    """Croissant 1.0 metadata of an export: its files, and for Parquet its columns."""
    run, schema = contents.run, shape.schema(contents) if shape.schema else None
    files = {
        "@type": "cr:FileSet",
        "@id": "files",
        "description": f"The records by split, in {shape.folder}/",
        "encodingFormat": ENCODINGS[shape.suffix],
        "includes": f"{shape.folder}/*.{shape.suffix}",
    }
    described = {
        "@context": CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": f"diffva-{run.fingerprint}",
        "description": "Healthy counterfactuals (synthetic images) and signed attribution maps. Not for clinical use.",
        "license": license_id,
        "version": str(about["diffva_ray"]),
        "datePublished": str(run.about["started"]).partition("T")[0],
        "citeAs": CITATION,
        "distribution": [files],
    }
    if schema is None:
        return described
    fields = [_field(name, kind) for name, kind in zip(schema.names, schema.types)]
    return described | {"recordSet": [{"@type": "cr:RecordSet", "@id": "records", "field": fields}]}


def _field(name: str, kind: pa.DataType) -> dict[str, Any]:
    source: dict[str, Any] = {"fileSet": {"@id": "files"}, "extract": {"column": name}}
    if pa.types.is_struct(kind):
        data_type, source["transform"] = "sc:ImageObject", {"jsonPath": "bytes"}
    elif pa.types.is_integer(kind):
        data_type = "sc:Integer"
    elif pa.types.is_floating(kind) or pa.types.is_list(kind):
        data_type = "sc:Float"
    else:
        data_type = "sc:Text"
    field = {"@type": "cr:Field", "@id": f"records/{name}", "dataType": data_type, "source": source}
    repeated = {"repeated": True} if pa.types.is_list(kind) else {}
    return field | repeated | ({"description": MEANINGS[name]} if name in MEANINGS else {})
