"""The verb ``paper``, which reproduces the tables and figures of the paper."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import click

from diffva_ray.commands.dry_run import show
from diffva_ray.commands.verb import (
    DONE,
    boxes_option,
    brixia_option,
    dry_run_option,
    echo,
    execution,
    execution_options,
    model_option,
    recipe_option,
    set_option,
    sources_option,
    verb,
    weights_option,
)

# fmt: off
radiography_option = click.option("--radiography", metavar="DATA", help="COVID-19 Radiography Database; default with --quick: phantoms.")
chexpert_option    = click.option("--chexpert",    metavar="DATA", help="CheXpert-v1.0-small, for table 4; default with --quick: phantoms.")
out_option         = click.option("--out",         metavar="DIR", required=True, help="Output folder, local or s3://; an unfinished one continues.")
quick_option       = click.option("--quick",       is_flag=True, help="Use 24 images per class, and phantoms in place of data that are not given.")
limit_option       = click.option("--limit",       metavar="N", type=click.IntRange(4), help="Maximum number of images per class.")
resize_option      = click.option("--resize",      type=click.Choice(["clean", "legacy"]), default="legacy", show_default=True, help="Resizing before Inception: as pytorch-fid and the paper (legacy), or bicubic with antialiasing (clean).")
carcinoma_option   = click.option("--carcinoma",   metavar="IMAGE", help="A real carcinoma, shown in figure 4; default with phantoms: a phantom mass.")
base_option        = click.option("--base",        metavar="MODEL", help="The model before fine-tuning (trained with 0 steps), for the yardstick in table 5.")
# fmt: on


@verb("paper", "Reproduce the tables and figures of the paper")
@radiography_option
@chexpert_option
@model_option
@base_option
@out_option
@quick_option
@limit_option
@carcinoma_option
@boxes_option
@brixia_option
@sources_option
@weights_option
@resize_option
@execution_options
@recipe_option
@set_option
@dry_run_option
def paper(model: str, inception_weights: str | None, dry_run: bool, **options: Any) -> int:
    """Reproduce every table and figure of Siddiqui et al. 2024 from images and a model, beside the published values.

    The page lists what cannot be made, with the reason. --set changes all runs, as in generate.num_inference_steps=20.

    Example:
        diffva paper --quick --model runs/demo/model --out runs/paper
        diffva paper --radiography DATA --chexpert CHEXPERT --model models/cxr --out runs/paper
    """
    from diffva_ray.evaluate.options import inception_path
    from diffva_ray.model.recipe import model_recipe
    from diffva_ray.paper.build import planned_paper, run_paper
    from diffva_ray.paper.state import Inputs

    # A dry run needs no weights and downloads none.
    weights = None if dry_run else inception_path(inception_weights)
    known = {field.name: options[field.name] for field in fields(Inputs) if field.name in options}
    inputs = Inputs(**known, model=model, weights=weights, execution=execution(options))
    if dry_run:
        show(model_recipe(model, inputs.recipe, inputs.overrides), **planned_paper(inputs))
        return DONE
    echo(f"open {run_paper(inputs)}")
    return DONE
