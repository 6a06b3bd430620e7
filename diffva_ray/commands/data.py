"""Verbs about images: make phantoms, look at a data set."""

from __future__ import annotations

import json

import click

from diffva_ray.commands.verb import dry_run_option, names, recipe_or_phantom, set_option, show, verb
from diffva_ray.config.recipe import load_recipe
from diffva_ray.data.dataset import UnusableData


@verb("phantoms")
@click.argument("out")
@click.option("--patients", default=400, show_default=True, metavar="N", help="Images in all, classes in turn.")
@click.option("--size", metavar="PX", type=click.IntRange(16, 4096), help="Side of the images; default: the recipe's.")
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same images.")
@click.option("--classes", metavar="A,B", help="Classes; default: Normal, Lung_Opacity, COVID, Viral Pneumonia.")
@click.option("--onto", metavar="DATA", help="Put the lesions into the healthy images of this data set.")
@recipe_or_phantom
@set_option
@dry_run_option
def phantoms(out: str, patients: int, size: int | None, seed: int, classes: str | None, onto: str | None,
             recipe: str, overrides: tuple[str, ...], dry_run: bool) -> None:  # fmt: skip
    """Write synthetic thorax images with lung masks, lesion masks and ground-truth counterfactual; with --onto real healthy images
    with synthetic lesions, whose originals are the exact counterfactuals.

    Example:
        diffva phantoms data/test --patients 400 --size 128 --seed 7
        diffva phantoms data/onto --onto data/COVID-19_Radiography_Dataset --patients 400 --size 128
    """
    from diffva_ray.data.datasets import open_dataset
    from diffva_ray.data.implants import implant_set
    from diffva_ray.data.phantoms import CLASSES, phantom_set
    from diffva_ray.storage.store import open_store

    resolved = load_recipe(recipe, overrides)
    chosen = names(classes) or CLASSES
    side = size or resolved.model.resolution
    dataset = open_dataset(onto, resolved.data) if onto else None
    healthy = resolved.data.healthy_class
    if dry_run:
        about = {"onto": onto, "healthy_images": dataset.classes.get(healthy, 0)} if dataset else {}
        return show(resolved, out=out, patients=patients, size=side, seed=seed, classes=chosen, **about)
    try:
        store = open_store(out)
        if dataset is not None:
            made = sum(1 for _ in implant_set(store, dataset, healthy, patients, side, seed, chosen))
        else:
            made = sum(1 for _ in phantom_set(store, patients, side, seed, chosen))
    except ValueError as error:
        raise UnusableData(str(error)) from None
    click.echo(f"{made} images of {side} px in {out}")


@verb("inspect")
@click.argument("data")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@recipe_or_phantom
@set_option
def inspect(data: str, as_json: bool, recipe: str, overrides: tuple[str, ...]) -> None:
    """What a data set holds: classes, sizes, masks, unreadable files, near-duplicates.

    Example:
        diffva inspect data/COVID-19_Radiography_Dataset
    """
    from diffva_ray.data.datasets import open_dataset
    from diffva_ray.data.inspection import describe_findings
    from diffva_ray.data.inspection import inspect as examine

    config = load_recipe(recipe, overrides).data
    found = examine(open_dataset(data, config), config.healthy_class)
    click.echo(json.dumps(found, indent=1) if as_json else describe_findings(found))
