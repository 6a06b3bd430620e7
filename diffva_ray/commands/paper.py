"""The verb that makes the paper's tables and figures."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import click

from diffva_ray.commands.verb import (
    DONE,
    actors_option,
    change_option,
    dry_run_option,
    executor_option,
    gpus_option,
    model_option,
    recipe_option,
    set_option,
    show,
    verb,
    weights_option,
)

if TYPE_CHECKING:
    from diffva_ray.workflows.execution import Executor


@verb("paper")
@click.option("--radiography", metavar="DATA", help="The COVID-19 Radiography Database; phantoms with --quick.")
@click.option("--chexpert", metavar="DATA", help="CheXpert-v1.0-small, for table 4; phantoms with --quick.")
@model_option
@click.option("--out", metavar="DIR", required=True, help="Folder, or s3://; an unfinished one is continued.")
@click.option("--quick", is_flag=True, help="24 images of each class; phantoms where no data are given.")
@click.option("--limit", type=click.IntRange(4), metavar="N", help="At most so many images of each class.")
@click.option("--boxes", metavar="CSV", help="Lesion boxes (file,x,y,w,h in pixels of the image), for table S3.")
@click.option("--brixia", metavar="CSV", help="Readers' scores of lung zones (file, S-A to S-F, J-A to J-F), table S7.")
@weights_option
@click.option(
    "--resize",
    type=click.Choice(["clean", "legacy"]),
    default="clean",
    show_default=True,
    help="Way to Inception's grid.",
)
@actors_option
@gpus_option
@change_option
@executor_option
@recipe_option
@set_option
@dry_run_option
def paper(radiography: str | None, chexpert: str | None, model: str, out: str, quick: bool, limit: int | None,
          boxes: str | None, brixia: str | None, inception_weights: str | None, resize: Literal["clean", "legacy"], actors: int | None,
          gpus_per_actor: float | None, allow_environment_change: bool, executor: Executor,
          recipe: str | None, overrides: tuple[str, ...], dry_run: bool) -> int:  # fmt: skip
    """Every table and figure of Siddiqui et al. 2024 from images and a model, the published values beside ours.

    What cannot be made is listed with the reason. --set changes every run, as in generate.num_inference_steps=20.

    Example:
        diffva paper --quick --model runs/demo/model --out runs/paper
        diffva paper --radiography DATA --chexpert CHEXPERT --model models/cxr --out runs/paper
    """
    from diffva_ray.evaluate.options import inception_path
    from diffva_ray.paper.build import planned_paper, run_paper
    from diffva_ray.paper.state import Inputs
    from diffva_ray.workflows.execution import Execution, model_recipe

    execution = Execution(
        executor=executor,
        actors=actors,
        gpus_per_actor=gpus_per_actor,
        allow_environment_change=allow_environment_change,
    )
    weights = None if dry_run else inception_path(inception_weights)
    inputs = Inputs(
        radiography=radiography,
        chexpert=chexpert,
        model=model,
        out=out,
        quick=quick,
        limit=limit,
        weights=weights,
        resize=resize,
        recipe=recipe,
        overrides=overrides,
        boxes=boxes,
        brixia=brixia,
        execution=execution,
    )
    if dry_run:
        show(model_recipe(model, recipe, overrides), **planned_paper(inputs))
        return DONE
    click.echo(f"open {run_paper(inputs)}")
    return DONE
