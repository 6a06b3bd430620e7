"""Verb export: a run as a data set that others can load."""

from __future__ import annotations

from typing import Any

import click

from diffva_ray.commands.verb import boxes_option, echo, executor_option, verb

SCORES = ("ssim", "ms_ssim", "psnr", "l1", "attribution_energy", "attribution_energy_lung_fraction")
FORMATS = ("huggingface", "webdataset", "dicom", "coco")


# fmt: off
format_option    = click.option("--to",             "format",      type=click.Choice(FORMATS), required=True, help="Parquet for Hugging Face datasets, tar for WebDataset, DICOM files, or COCO annotations.")
out_option       = click.option("--out",            metavar="DIR", required=True, help="Folder of the export, local or s3://; an unfinished export continues.")
accept_option    = click.option("--accept",         metavar="RULE", default="", help="Export only records for which a condition on their columns holds.")
without_option   = click.option("--without-images", is_flag=True, help="Leave out the source image and what shows it; its path and SHA-256 stay.")
best_option      = click.option("--best-of",        type=click.Choice(SCORES), default=None, help="Export the best sample of each image by this score; among accepted ones with --accept.")
splits_option    = click.option("--splits",         metavar="NAME=SHARE,...", help="Splits by patient; default: the data set's own, else train=0.8,validation=0.1,test=0.1.")
shuffle_option   = click.option("--shuffle",        metavar="SEED", type=click.IntRange(0), help="Shuffle the records by this seed; default: the order of the run.")
license_option   = click.option("--license",        "license_id", metavar="ID", default="", help="Licence in the data card, as the hub names it, such as cc-by-4.0.")
threshold_option = click.option("--threshold",      type=click.FloatRange(0, 1, min_open=True), metavar="F", help="Threshold of the maps for --to coco and dicom; default: the run's own.")
patients_option  = click.option("--with-patients",  "patients",    is_flag=True, help="Copy the patient data of DICOM headers into --to dicom; default: a pseudonym only.")
banner_option    = click.option("--banner",         is_flag=True, help="Burn the word SYNTHETIC into the counterfactuals of --to dicom.")
push_option      = click.option("--push-to",        metavar="ORG/NAME", help="Upload the export to the Hugging Face Hub, as a private data set; its folder must be local.")
nameless_option  = click.option("--anonymise-names", "anonymous", is_flag=True, help="Replace the names of image files by ids.")
moved_option     = click.option("--data",           metavar="DATA", help="New address of the data set, if it has moved.")
# fmt: on


@verb("export", "Write a run as a data set for others")
@click.argument("run")
@format_option
@out_option
@accept_option
@best_option
@without_option
@splits_option
@shuffle_option
@license_option
@threshold_option
@patients_option
@banner_option
@boxes_option
@executor_option
@push_option
@moved_option
@nameless_option
def export(run: str, out: str, data: str | None, splits: str | None, license_id: str, **options: Any) -> None:
    """Write a reduced run as a data set that others can load without this package: images, attribution maps, all
    columns of the records, splits by patient and a data card.

    Example:
        diffva export runs/first --to huggingface --out exports/first
        diffva export runs/first --to huggingface --out exports/good --accept "ssim > 0.8 and judge_counterfactual > 0.5"
    """
    from diffva_ray.export.card import acceptance, judged
    from diffva_ray.export.exporting import ExportOptions
    from diffva_ray.export.selection import parse_splits
    from diffva_ray.generate.data_identity import moved
    from diffva_ray.generate.run import open_run
    from diffva_ray.workflows.export import export as write_export

    if options["threshold"] is not None and options["format"] not in ("coco", "dicom"):
        raise click.UsageError("--threshold is for --to coco and --to dicom; other formats hold the whole map")
    if options["push_to"] and "://" in out:
        raise click.UsageError("--push-to uploads a local folder; give a local --out")
    for name, option in (("patients", "--with-patients"), ("banner", "--banner")):
        if options[name] and options["format"] != "dicom":
            raise click.UsageError(f"{option} is for --to dicom only")
    opened = open_run(run)
    if data is not None:
        opened = moved(opened, data)
    exported = write_export(
        opened,
        out,
        ExportOptions(
            format=options["format"],
            images=not options["without_images"],
            accept=options["accept"],
            best_of=options["best_of"] or "",
            splits=parse_splits(splits) if splits else None,
            threshold=options["threshold"],
            patients=options["patients"],
            banner=options["banner"],
            shuffle=options["shuffle"],
            license=license_id,
            boxes=options["boxes"],
            anonymous=options["anonymous"],
        ),
        options["executor"],
    )
    # What was exported, by class and by split.
    if options["accept"] or options["best_of"]:
        for label, records, accepted, rate, ssim, lungs, flipped in acceptance(exported.counts):
            echo(
                f"{label}: {accepted} of {records} records accepted ({rate}); mean SSIM {ssim}, attribution in lungs "
                f"{lungs}, flip rate {flipped}"
            )
        if judged(exported.rule):
            echo("the rule reads the judge: a flip rate of these records is no evidence", err=True)
    by_split = ", ".join(f"{count} {name}" for name, count in exported.counts.splits.items())
    fresh = "" if exported.fresh else " (already complete; nothing written)"
    echo(f"{exported.counts.accepted} records in {out} ({by_split}); card in {out}/README.md{fresh}")
    if options["push_to"]:
        from diffva_ray.export.hub import push

        echo(f"uploaded to {push(out, options['push_to'])}, private until you publish it there")
