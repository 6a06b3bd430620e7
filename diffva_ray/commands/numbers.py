"""Verbs about numbers and pages: tables and report."""

from __future__ import annotations

import click

from diffva_ray.commands.verb import executor_option, verb


@verb("reduce")
@click.argument("run")
@click.option("--reference", multiple=True, metavar="LABEL=DATA_OR_RUN", help="Compare with class LABEL; repeatable.")
@click.option("--boxes", metavar="CSV", help="Lesion boxes: file,x,y,w,h in pixels of the film.")
@click.option("--inception-weights", metavar="PATH|download", help="pytorch-fid's state dict; default: its cache.")
@click.option(
    "--resize", type=click.Choice(["clean", "legacy"]), help="Way to Inception's grid; legacy: pytorch-fid's."
)
@click.option("--threshold-from", metavar="RUN", help="Fix Dice thresholds on this (validation) run.")
@executor_option
def reduce(run: str, reference: tuple[str, ...], boxes: str | None, inception_weights: str | None, resize: str | None,
           threshold_from: str | None, executor: str) -> None:  # fmt: skip
    """Verify a run and write its tables, quarantine, manifest and _SUCCESS.

    Example:
        diffva reduce runs/first --reference Normal=data/test
    """
    from diffva_ray import pipeline
    from diffva_ray.evaluate.reduction import Options
    from diffva_ray.evaluate.summary import print_summary

    opened = pipeline.existing_run(run)
    options = Options(
        pipeline.parse_references(reference), boxes, pipeline.inception_path(inception_weights),
        resize or opened.recipe.evaluate.resize, threshold_from,
    )  # fmt: skip
    reduced = pipeline.reduce(opened, options, executor)
    print_summary(reduced.metrics)
    click.echo(f"tables in {run}/tables" + ("" if reduced.fresh else " (reduced already; nothing written)"))


@verb("report")
@click.argument("run")
def report(run: str) -> None:
    """Write the figures and the HTML report of a run, finished or not.

    Example:
        diffva report runs/first
    """
    from diffva_ray.evaluate.report.page import write_report
    from diffva_ray.pipeline import existing_run

    click.echo(f"open {write_report(existing_run(run))}")
