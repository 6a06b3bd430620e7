"""Verbs about a model: train it, and the whole line from phantoms to report."""

from __future__ import annotations

import click

from diffva_ray.commands.verb import (
    data_option,
    dry_run_option,
    executor_option,
    recipe_option,
    set_option,
    show,
    verb,
)
from diffva_ray.config import load_recipe


@verb("demo")
@click.option("--out", default="runs/demo", show_default=True, metavar="DIR", help="Where everything goes.")
@click.option("--quick", is_flag=True, help="The same path with less of everything, in under 4 minutes.")
@click.option("--seed", default=0, show_default=True, help="Seed of phantoms, training and generation.")
def demo(out: str, quick: bool, seed: int) -> None:
    """The whole line on this machine: phantoms, training, twins, tables and a page.

    Example:
        diffva demo --quick
    """
    from diffva_ray.demo import run_demo

    click.echo(run_demo(out, quick, seed))


@verb("train")
@data_option
@click.option("--out", metavar="MODEL", required=True, help="Model folder to write, or s3://.")
@click.option("--workers", default=1, show_default=True, type=click.IntRange(1), help="Ray Train workers.")
@click.option("--gpus-per-worker", type=click.FloatRange(0), metavar="F", help="Default: 1 where the cluster has GPUs.")
@executor_option
@recipe_option
@set_option
@dry_run_option
def train(data: str, out: str, workers: int, gpus_per_worker: float | None, executor: str, recipe: str | None,
          overrides: tuple[str, ...], dry_run: bool) -> None:  # fmt: skip
    """Fine-tune the UNet and the text encoder together. The same command again goes on, or does nothing.

    Example:
        diffva train --data data/train --out models/mine --recipe phantom
    """
    from diffva_ray.pipeline import train_model, training_keys

    resolved = load_recipe(recipe or "phantom", overrides)
    if dry_run:
        return show(resolved, data=data, out=out, films=len(training_keys(resolved, data)[1].films), workers=workers)
    if train_model(resolved, data, out, workers, gpus_per_worker, executor):
        click.echo(f"model written to {out}")
