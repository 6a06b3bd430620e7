"""Verbs about images: write phantoms, inspect a data set."""

from __future__ import annotations

import json

import click

from diffva_ray.commands.dry_run import show
from diffva_ray.commands.verb import (
    data_options,
    dry_run_option,
    echo,
    healthy_option,
    names,
    recipe_or_phantom,
    set_option,
    verb,
    with_flags,
)
from diffva_ray.config.recipe import load_recipe
from diffva_ray.data.dataset import UnusableData


@verb("phantoms", "Write a set of synthetic X-rays")
@click.argument("out")
@click.option(
    "--patients", default=400, show_default=True, metavar="N", help="Total number of images; classes take turns."
)
@click.option(
    "--size",
    metavar="PX",
    type=click.IntRange(16, 4096),
    help="Side of the images in pixels; default: the recipe's resolution.",
)
@click.option("--seed", default=0, show_default=True, help="Random seed; equal seeds give equal images.")
@click.option("--classes", metavar="A,B", help="Classes to write; default: Normal,Lung_Opacity,COVID,Viral Pneumonia.")
@click.option("--factors", is_flag=True, help="Vary age, sex, view, side, zone, size, severity and a second finding.")
@click.option("--changes", is_flag=True, help="With --factors: also write each image with one factor replaced.")
@click.option("--onto", metavar="DATA", help="Draw the lesions into the healthy images of this data set.")
@click.option("--vary", is_flag=True, help="With --onto: also vary position, exposure, sharpness and devices.")
@click.option(
    "--transplants",
    type=click.Choice(["boxes", "anywhere"]),
    help="With --onto: cut the lesions out of the data set's abnormal images, from their boxes or anywhere.",
)
@recipe_or_phantom
@set_option
@dry_run_option
def phantoms(out: str, patients: int, size: int | None, seed: int, classes: str | None, factors: bool, changes: bool,
             onto: str | None, vary: bool, transplants: str | None, recipe: str, overrides: tuple[str, ...],
             dry_run: bool) -> None:  # fmt: skip
    """Write synthetic chest X-rays with lung masks, lesion masks and ground-truth counterfactuals. With --onto, draw
    synthetic lesions into real healthy images; the originals are then the ground-truth counterfactuals. With
    --factors, factors.csv names what each image shows.

    Example:
        diffva phantoms data/test --patients 400 --size 128 --seed 7
        diffva phantoms data/words --factors --changes --patients 400 --size 128
        diffva phantoms data/onto --onto data/COVID-19_Radiography_Dataset --patients 400 --size 128
    """
    from diffva_ray.data.datasets import open_dataset
    from diffva_ray.data.factor_phantoms import factor_set
    from diffva_ray.data.implants import Source, implant_set
    from diffva_ray.data.phantoms import CLASSES, phantom_set
    from diffva_ray.data.transplants import Donors
    from diffva_ray.storage.opening import open_store

    if not onto and (vary or transplants):
        raise click.UsageError(f"{'--vary' if vary else '--transplants'} needs --onto DATA")
    if changes and not factors:
        raise click.UsageError("--changes needs --factors")
    if factors and onto:
        raise click.UsageError("--factors and --onto cannot be combined: the factors of real images are not known")

    resolved = load_recipe(recipe, overrides)
    chosen = names(classes) or CLASSES
    side = size or resolved.model.resolution
    dataset = open_dataset(onto, resolved.data) if onto else None
    healthy = resolved.data.healthy_class
    if dry_run:
        base = {"onto": onto, "healthy_images": dataset.classes.get(healthy, 0)} if dataset is not None else {}
        return show(resolved, out=out, patients=patients, size=side, seed=seed, classes=chosen, **base)
    try:
        store = open_store(out)
        if dataset is not None:
            donors = Donors(dataset, healthy, chosen, side, boxes=transplants == "boxes") if transplants else None
            images = implant_set(store, dataset, healthy, patients, side, Source(seed, vary, donors), chosen)
        elif factors:
            images = factor_set(store, patients, side, seed, chosen, changes)
        else:
            images = phantom_set(store, patients, side, seed, chosen)
        count = sum(1 for _ in images)
    except ValueError as error:
        raise UnusableData(str(error)) from None
    echo(f"{count} images of {side} px in {out}")


@verb("inspect", "Show what a data set contains")
@click.argument("data")
@click.argument("other", required=False)
@data_options
@healthy_option
@click.option("--json", "as_json", is_flag=True, help="Print the findings as JSON.")
@recipe_or_phantom
@set_option
def inspect(data: str, other: str | None, columns: str | None, root: str | None, healthy_class: str | None,
            as_json: bool, recipe: str, overrides: tuple[str, ...]) -> None:  # fmt: skip
    """Show what a data set contains and how it was recognised: classes, patients, views, image sizes, masks and boxes,
    unreadable files, suspects (inverted, rotated, cropped, padded, coloured, with text, not frontal) and near-duplicates.
    With OTHER, also show what the two data sets have in common: patients, equal files, near-duplicates. DATA can be a
    single image.

    Example:
        diffva inspect data/COVID-19_Radiography_Dataset
        diffva inspect images.csv --columns image=Path,label=Finding,patient=PatientID --root /data/images
        diffva inspect data/train data/test
    """
    from diffva_ray.data import inspection
    from diffva_ray.data.datasets import dataset_or_image

    data_flags = {"data__columns": columns, "data__root": root, "data__healthy_class": healthy_class}
    config = load_recipe(recipe, with_flags(overrides, **data_flags)).data
    first, *rest = [inspection.examine(dataset_or_image(uri, config)) for uri in (data, other) if uri]
    summary = inspection.summary(first, config.healthy_class)
    common = inspection.overlap(first, rest[0]) if rest else None
    if as_json:
        return click.echo(json.dumps({**summary, **({"overlap": common} if common else {})}, indent=1))
    echo(inspection.describe_findings(summary))
    if common:
        echo(inspection.describe_overlap(common))
