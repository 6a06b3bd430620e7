"""Verbs about a model: train it, apply it to one image, run the demo."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

import click

from diffva_ray.commands.dry_run import show
from diffva_ray.commands.verb import (
    compose_options,
    composed_prompt,
    data_option,
    data_options,
    dry_run_option,
    echo,
    executor_option,
    healthy_option,
    recipe_option,
    recipe_or_phantom,
    set_option,
    settings_options,
    settings_overrides,
    small_option,
    verb,
    with_flags,
)
from diffva_ray.config.recipe import load_recipe
from diffva_ray.config.stages import CONDITION
from diffva_ray.data.dataset import UnusableData

if TYPE_CHECKING:
    from diffva_ray.workflows.execution import Executor


image_seed_option = click.option(
    "--seed", type=int, help="Random seed, as in generate; the image's seed is derived from it and the file name."
)


def worker_count(_: click.Context, __: click.Parameter, text: str) -> int | tuple[int, int]:
    """Parse ``4`` or ``1:4``."""
    parts = text.split(":")
    if not (1 <= len(parts) <= 2 and all(part.isdigit() and int(part) for part in parts)):
        raise click.BadParameter(f"{text!r}: give a number of workers, or MIN:MAX")
    numbers = [int(part) for part in parts]
    if len(numbers) == 2 and numbers[0] > numbers[1]:
        raise click.BadParameter(f"{text!r}: MIN must not exceed MAX")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


@verb("demo", "Run the end-to-end demo")
@click.option(
    "--out", default="runs/demo", show_default=True, metavar="DIR", help="Folder for data, model, run and report."
)
@click.option("--quick", is_flag=True, help="Use fewer images and training steps; takes under 4 minutes.")
@click.option("--seed", default=0, show_default=True, help="Random seed of phantoms, training and generation.")
def demo(out: str, quick: bool, seed: int) -> None:
    """Run the whole pipeline on this machine: write phantoms, train a model, generate counterfactuals, compute the
    tables and write the report.

    Example:
        diffva demo --quick
    """
    from diffva_ray.workflows.demo import run_demo

    echo(run_demo(out, quick, seed))


@verb("train", "Train a model on a data set")
@data_option
@data_options
@healthy_option
@click.option("--out", metavar="MODEL", required=True, help="Model folder to write, local or s3://.")
@click.option(
    "--workers",
    default="1",
    show_default=True,
    metavar="N|MIN:MAX",
    callback=worker_count,
    help="Number of Ray Train workers; MIN:MAX follows the size of the cluster.",
)
@click.option(
    "--gpus-per-worker",
    type=click.FloatRange(0),
    metavar="F",
    help="GPUs per worker; default: 1 if the cluster has GPUs, else 0.",
)
@executor_option
@recipe_or_phantom
@set_option
@dry_run_option
def train(data: str, columns: str | None, root: str | None, healthy_class: str | None, out: str,
          workers: int | tuple[int, int], gpus_per_worker: float | None, executor: Executor, recipe: str,
          overrides: tuple[str, ...], dry_run: bool) -> None:  # fmt: skip
    """Train the stages of the recipe on the classes of the data. Repeat the command to continue an
    interrupted training; a finished one is left as it is.

    Example:
        diffva train --data data/train --out models/mine --recipe phantom
    """
    from diffva_ray.workflows.train import check_training, train_model

    data_flags = {"data__columns": columns, "data__root": root, "data__healthy_class": healthy_class}
    resolved = load_recipe(recipe, with_flags(overrides, **data_flags))
    if dry_run:
        resolved, summary, images, memory = check_training(resolved, data, out, workers)
        summary = [*summary, *(f"GPU memory: {line}" for line in memory)]
        return show(resolved, data=data, out=out, images=images, workers=workers, summary=summary)
    if train_model(resolved, data, out, workers, gpus_per_worker, executor):
        folder = shlex.quote(out)
        echo(f"model written to {folder}; next: diffva generate --data TEST_IMAGES --model {folder} --out RUN")


def _default_output(image: str, suffix: str) -> str:
    """Name of an output file in the current folder: dir/image.png -> image.explained.png."""
    name = image.rpartition("/")[2]
    return f"{name.rpartition('.')[0] or name}.{suffix}.png"


def _condition_paths(texts: tuple[str, ...]) -> dict[str, str]:
    """Parse ``--condition`` options: ``depth=FILE`` -> {"condition.depth": FILE}."""
    pairs = [text.partition("=") for text in texts]
    if wrong := [text for text, (name, _, path) in zip(texts, pairs, strict=True) if not name or not path]:
        raise click.UsageError(f"--condition {wrong[0]}: write NAME=FILE, for example depth=image.depth.png")
    paths = {CONDITION + name: path for name, _, path in pairs}
    if len(paths) < len(pairs):
        raise click.UsageError("--condition: a name is given twice")
    return paths


@verb("explain", "Explain one image")
@click.argument("image")
@small_option
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    metavar="TEXT",
    help="Prompt of the counterfactual; repeatable, one row of the sheet each; default: the recipe's healthy prompt.",
)
@compose_options
@click.option(
    "--condition",
    "conditions",
    multiple=True,
    metavar="NAME=FILE",
    help="Condition image of the ControlNet that reads condition.NAME; repeatable.",
)
@click.option(
    "--out",
    metavar="FILE",
    help="Path of the sheet (.png, .pdf or .svg), local or s3://; default: <image>.explained.png in the current folder.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the metrics as JSON.")
@settings_options
@image_seed_option
@recipe_option
@set_option
@dry_run_option
def explain(
    image: str, model: str, prompts: tuple[str, ...], conditions: tuple[str, ...], out: str | None, as_json: bool,
    **options: Any,
) -> None:  # fmt: skip
    """Explain one image: generate its healthy counterfactual and attribution map, print the metrics and write a
    sheet. The result equals that of generate if the image's path in the data set is the bare file name.

    Example:
        diffva explain image.png
        diffva explain image.png --model models/mine --prompt "normal chest scan" --prompt "COVID 19"
        diffva explain image.png --model models/words --prompt "Mass on the left" --and "80 year old" --not "Lung Opacity"
    """
    from diffva_ray.explain.image import explain as explain_image
    from diffva_ray.explain.sheet import check_sheet, describe, write_sheet
    from diffva_ray.model.recipe import model_recipe

    recipe = model_recipe(model, options["recipe"], settings_overrides(options))
    paths = _condition_paths(conditions)
    if options["also"] or options["without"]:
        prompts = tuple(composed_prompt(prompt, options) for prompt in prompts or [recipe.data.healthy_prompt])
    path = out or _default_output(image, "explained")
    check_sheet(path)
    if options["dry_run"]:
        return show(recipe, image=image, model=model, out=path, prompts=prompts or [recipe.data.healthy_prompt])
    explanation = explain_image(image, model, recipe, prompts, conditions=paths)
    write_sheet(explanation, path)
    if as_json:
        return echo(json.dumps({**explanation.as_dict(), "sheet": path}, indent=1))
    echo(f"{describe(explanation)}\nsheet in {path}")


@verb("interpolate", "Interpolate two prompts or two images")
@click.argument("image")
@small_option
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="Prompt; give two to interpolate them.")
@click.option("--to", "other", metavar="IMAGE", help="Second image to interpolate to, under one --prompt or none.")
@click.option("--frames", default=7, show_default=True, type=click.IntRange(2, 25), help="Images in the strip.")
@click.option(
    "--out",
    metavar="FILE",
    help="Path of the strip (.png, .pdf or .svg), local or s3://; default: <image>.interpolated.png in the current folder.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the metrics as JSON.")
@settings_options
@image_seed_option
@recipe_option
@set_option
@dry_run_option
def interpolate(image: str, model: str, prompts: tuple[str, ...], other: str | None, frames: int, out: str | None,
                as_json: bool, **options: Any) -> None:  # fmt: skip
    """Write a strip of images between two prompts (mixes their text embeddings) or between two images (mixes their
    noisy latents), with the judge's probability of healthy for each.

    Example:
        diffva interpolate image.png --model models/mine --prompt "normal chest scan" --prompt "COVID 19"
        diffva interpolate image.png --model models/mine --to other.png
    """
    from diffva_ray.explain.interpolate import interpolate as interpolate_image
    from diffva_ray.explain.interpolate import write_strip
    from diffva_ray.explain.sheet import check_sheet
    from diffva_ray.model.recipe import model_recipe

    ignored = [f"--{name}" for name in ("method", "scheduler") if options[name] is not None]
    if other is not None and ignored:
        raise UnusableData(f"{' and '.join(ignored)}: not with --to, which always interpolates by DDIM inversion")
    recipe = model_recipe(model, options["recipe"], settings_overrides(options))
    path = out or _default_output(image, "interpolated")
    check_sheet(path)
    if options["dry_run"]:
        return show(recipe, image=image, to=other, model=model, out=path, prompts=prompts, frames=frames)
    strip = interpolate_image(image, model, recipe, prompts, other, frames)
    write_strip(strip, path)
    echo(json.dumps({**strip.as_dict(), "strip": path}, indent=1) if as_json else f"strip in {path}")
