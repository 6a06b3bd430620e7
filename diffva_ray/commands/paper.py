"""The verb ``paper``, which reproduces the tables and figures of the paper."""

from __future__ import annotations

from typing import Any, Literal

import click

from diffva_ray.commands.verb import (
    DONE,
    dry_run_option,
    echo,
    execution,
    execution_options,
    model_option,
    recipe_option,
    set_option,
    show,
    verb,
    weights_option,
)


@verb("paper", "Reproduce the tables and figures of the paper")
@click.option("--radiography", metavar="DATA", help="COVID-19 Radiography Database; default with --quick: phantoms.")
@click.option("--chexpert", metavar="DATA", help="CheXpert-v1.0-small, for table 4; default with --quick: phantoms.")
@model_option
@click.option("--out", metavar="DIR", required=True, help="Output folder, local or s3://; an unfinished one continues.")
@click.option(
    "--quick", is_flag=True, help="Use 24 images per class, and phantoms in place of data that are not given."
)
@click.option("--limit", type=click.IntRange(4), metavar="N", help="Maximum number of images per class.")
@click.option("--boxes", metavar="CSV", help="CSV of lesion boxes for table S3: file,x,y,w,h in pixels of the image.")
@click.option("--brixia", metavar="CSV", help="CSV of Brixia zone scores for table S7: file, S-A to S-F, J-A to J-F.")
@weights_option
@click.option(
    "--resize",
    type=click.Choice(["clean", "legacy"]),
    default="clean",
    show_default=True,
    help="Resizing before Inception: bicubic with antialiasing (clean), or as pytorch-fid (legacy).",
)
@execution_options
@recipe_option
@set_option
@dry_run_option
def paper(radiography: str | None, chexpert: str | None, model: str, out: str, quick: bool, limit: int | None,
          boxes: str | None, brixia: str | None, inception_weights: str | None, resize: Literal["clean", "legacy"],
          recipe: str | None, overrides: tuple[str, ...], dry_run: bool, **options: Any) -> int:  # fmt: skip
    """Reproduce every table and figure of Siddiqui et al. 2024 from images and a model, beside the published values.

    The page lists what cannot be made, with the reason. --set changes all runs, as in generate.num_inference_steps=20.

    Example:
        diffva paper --quick --model runs/demo/model --out runs/paper
        diffva paper --radiography DATA --chexpert CHEXPERT --model models/cxr --out runs/paper
    """
    from diffva_ray.evaluate.options import inception_path
    from diffva_ray.paper.build import planned_paper, run_paper
    from diffva_ray.paper.state import Inputs
    from diffva_ray.workflows.execution import model_recipe

    # A dry run needs no weights and downloads none.
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
        execution=execution(options),
    )
    if dry_run:
        show(model_recipe(model, recipe, overrides), **planned_paper(inputs))
        return DONE
    echo(f"open {run_paper(inputs)}")
    return DONE
