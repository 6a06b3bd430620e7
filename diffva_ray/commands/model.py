"""Verbs about a model: train it, ask it about one image, and the whole line from phantoms to report."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from diffva_ray.commands.verb import (
    data_option,
    dry_run_option,
    executor_option,
    model_option,
    recipe_option,
    recipe_or_phantom,
    set_option,
    settings_options,
    settings_overrides,
    show,
    verb,
)
from diffva_ray.config.recipe import load_recipe

if TYPE_CHECKING:
    from diffva_ray.workflows.execution import Executor


def worker_count(_: click.Context, __: click.Parameter, text: str) -> int | tuple[int, int]:
    """``4``, or ``1:4``."""
    parts = text.split(":")
    if not (1 <= len(parts) <= 2 and all(part.isdigit() and int(part) for part in parts)):
        raise click.BadParameter(f"{text!r}: give a number of workers, or MIN:MAX")
    numbers = [int(part) for part in parts]
    if len(numbers) == 2 and numbers[0] > numbers[1]:
        raise click.BadParameter(f"{text!r}: the first number is the smaller one")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


@verb("demo")
@click.option("--out", default="runs/demo", show_default=True, metavar="DIR", help="Where everything goes.")
@click.option("--quick", is_flag=True, help="The same path with less of everything, in under 4 minutes.")
@click.option("--seed", default=0, show_default=True, help="Seed of phantoms, training and generation.")
def demo(out: str, quick: bool, seed: int) -> None:
    """The whole line on this machine: phantoms, training, counterfactuals, tables and a page.

    Example:
        diffva demo --quick
    """
    from diffva_ray.workflows.demo import run_demo

    click.echo(run_demo(out, quick, seed))


@verb("train")
@data_option
@click.option("--out", metavar="MODEL", required=True, help="Model folder to write, or s3://.")
@click.option(
    "--workers",
    default="1",
    show_default=True,
    metavar="N|MIN:MAX",
    callback=worker_count,
    help="Ray Train workers; MIN:MAX grows and shrinks with the cluster.",
)
@click.option("--gpus-per-worker", type=click.FloatRange(0), metavar="F", help="Default: 1 where the cluster has GPUs.")
@executor_option
@recipe_or_phantom
@set_option
@dry_run_option
def train(data: str, out: str, workers: int | tuple[int, int], gpus_per_worker: float | None, executor: Executor, recipe: str,
          overrides: tuple[str, ...], dry_run: bool) -> None:  # fmt: skip
    """Fine-tune the UNet and the text encoder together. The same command again goes on, or does nothing.

    Example:
        diffva train --data data/train --out models/mine --recipe phantom
    """
    from diffva_ray.workflows.train import train_model, training_keys

    resolved = load_recipe(recipe, overrides)
    if dry_run:
        return show(resolved, data=data, out=out, images=len(training_keys(resolved, data)[1].images), workers=workers)
    if train_model(resolved, data, out, workers, gpus_per_worker, executor):
        click.echo(f"model written to {out}")


def _beside_the_command(image: str, what: str) -> str:
    """A name in the current folder for what is made of an image: image.png -> image.explained.png."""
    name = image.rpartition("/")[2]
    return f"{name.rpartition('.')[0] or name}.{what}.png"


@verb("explain")
@click.argument("image")
@model_option
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    metavar="TEXT",
    help="What the counterfactual should be, a row of the sheet each; default: the recipe's healthy prompt.",
)
@click.option(
    "--out", metavar="FILE.png", help="The sheet, local or s3://; default: <image>.explained.png in the current folder."
)
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
@settings_options
@click.option("--seed", type=int, help="As of a run; the image's own is made of it and the file's name.")
@recipe_option
@set_option
@dry_run_option
def explain(image: str, model: str, prompts: tuple[str, ...], out: str | None, as_json: bool, **options: Any) -> None:
    """One image, at once: its healthy counterfactual, the attribution map, the numbers, and a sheet that shows them. The engine is
    that of generate; a run gives an image the same noise where its path in the data set is just the file's name.

    Example:
        diffva explain image.png --model models/mine --prompt "normal chest scan" --prompt "COVID 19"
    """
    from diffva_ray.explain.image import explain as ask
    from diffva_ray.explain.sheet import check_sheet, describe, write_sheet
    from diffva_ray.workflows.execution import model_recipe

    recipe = model_recipe(model, options["recipe"], settings_overrides(options))
    path = out or _beside_the_command(image, "explained")
    check_sheet(path)
    if options["dry_run"]:
        return show(recipe, image=image, model=model, out=path, prompts=prompts or [recipe.data.healthy_prompt])
    found = ask(image, model, recipe, prompts)
    write_sheet(found, path)
    if as_json:
        return click.echo(json.dumps({**found.as_dict(), "sheet": path}, indent=1))
    click.echo(f"{describe(found)}\nsheet in {path}")


@verb("interpolate")
@click.argument("image")
@model_option
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Twice: from the first to the second.")
@click.option("--to", "other", metavar="IMAGE", help="From image to image, under one --prompt or unedited.")
@click.option("--frames", default=7, show_default=True, type=click.IntRange(2, 25), help="Images of the strip.")
@click.option("--out", metavar="FILE.png", help="The strip, local or s3://; default: <image>.interpolated.png here.")
@click.option("--json", "as_json", is_flag=True, help="Print the numbers as JSON.")
@settings_options
@click.option("--seed", type=int, help="As of a run; the image's own is made of it and the file's name.")
@recipe_option
@set_option
@dry_run_option
def interpolate(image: str, model: str, prompts: tuple[str, ...], other: str | None, frames: int, out: str | None,
                as_json: bool, **options: Any) -> None:  # fmt: skip
    """A strip of images between two prompts (their text embeddings mixed) or between two images (their noisy latents
    mixed), with the judge's opinion of each.

    Example:
        diffva interpolate image.png --model models/mine --prompt "normal chest scan" --prompt "COVID 19"
        diffva interpolate image.png --model models/mine --to other.png
    """
    from diffva_ray.explain.interpolate import interpolate as between
    from diffva_ray.explain.interpolate import write_strip
    from diffva_ray.explain.sheet import check_sheet
    from diffva_ray.workflows.execution import model_recipe

    recipe = model_recipe(model, options["recipe"], settings_overrides(options))
    path = out or _beside_the_command(image, "interpolated")
    check_sheet(path)
    if options["dry_run"]:
        return show(recipe, image=image, to=other, model=model, out=path, prompts=prompts, frames=frames)
    strip = between(image, model, recipe, prompts, other, frames)
    write_strip(strip, path)
    click.echo(json.dumps({**strip.as_dict(), "strip": path}, indent=1) if as_json else f"strip in {path}")
