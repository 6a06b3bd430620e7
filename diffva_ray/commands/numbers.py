"""Verbs about numbers and pages: tables, report, anybody's maps, two runs side by side."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Literal

import click

from diffva_ray.commands.verb import data_option, executor_option, verb, weights_option
from diffva_ray.data.dataset import UnusableData

if TYPE_CHECKING:
    from diffva_ray.workflows.execution import Executor


@verb("reduce")
@click.argument("run")
@click.option("--data", metavar="DATA", help="Where the data set is now, if it has moved; the run remembers it.")
@click.option("--reference", multiple=True, metavar="LABEL=DATA_OR_RUN", help="Compare with class LABEL; repeatable.")
@click.option("--boxes", metavar="CSV", help="Lesion boxes: file,x,y,w,h in pixels of the image.")
@weights_option
@click.option(
    "--resize", type=click.Choice(["clean", "legacy"]), help="Way to Inception's grid; legacy: pytorch-fid's."
)
@click.option("--threshold-from", metavar="RUN", help="Fix Dice thresholds on this (validation) run.")
@click.option(
    "--extractor",
    multiple=True,
    metavar="NAME[=PATH]",
    help="Network of the distances: inception, torchxrayvision=WEIGHTS, rad-dino=FOLDER, judge[=MODEL] or stand-in; repeatable.",
)
@click.option(
    "--judge",
    multiple=True,
    metavar="NAME=PATH",
    help="Flip rates by another judge too: torchxrayvision=WEIGHTS or judge=MODEL; repeatable.",
)
@click.option("--lpips-weights", metavar="PATH", help="Torchvision's AlexNet state dict: adds LPIPS.")
@click.option(
    "--brixia", metavar="CSV", help="Readers' scores of lung zones (file, S-A to S-F, J-A to J-F) for the maps."
)
@click.option("--sources", metavar="CSV", help="Archive of each image (file, source): compares within each one, too.")
@executor_option
def reduce(run: str, data: str | None, reference: tuple[str, ...], boxes: str | None, inception_weights: str | None,
           resize: Literal["clean", "legacy"] | None, threshold_from: str | None, extractor: tuple[str, ...],
           judge: tuple[str, ...], lpips_weights: str | None, brixia: str | None, sources: str | None, executor: Executor) -> None:  # fmt: skip
    """Verify a run and write its tables, quarantine, manifest and _SUCCESS.

    Example:
        diffva reduce runs/first --reference Normal=data/test
        diffva reduce runs/first --extractor rad-dino=weights/rad-dino --extractor judge
    """
    from diffva_ray.evaluate.options import Options, inception_path, parse_references
    from diffva_ray.evaluate.summary import print_summary
    from diffva_ray.generate.run import open_run
    from diffva_ray.workflows.reduce import reduce

    opened = open_run(run)
    options = Options(
        references=parse_references(reference),
        boxes=boxes,
        weights=inception_path(inception_weights),
        resize=resize or opened.recipe.evaluate.resize,
        threshold_from=threshold_from,
        extractors=extractor,
        lpips=lpips_weights,
        brixia=brixia,
        sources=sources,
        judges=judge,
    )
    reduced = reduce(opened, options, executor, data)
    print_summary(reduced.metrics)
    click.echo(f"tables in {run}/tables" + ("" if reduced.fresh else " (reduced already; nothing written)"))


@verb("report")
@click.argument("run")
@click.option("--boxes", metavar="CSV", help="Lesion boxes to outline: file,x,y,w,h in pixels of the image.")
@click.option("--serve", "served", is_flag=True, help="Then show it on this machine's loopback address until Ctrl-C.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Of --serve; default: any that is free.")
@click.option(
    "--images",
    type=click.IntRange(1),
    metavar="N",
    help="Records in the viewer at most; default: by their size, up to 20000.",
)
def report(run: str, boxes: str | None, served: bool, port: int, images: int | None) -> None:
    """Write the figures and the HTML report of a run, finished or not: one page that opens from disk, with a viewer of
    its images. Pictures of an earlier report are kept where they still hold.

    Example:
        diffva report runs/first
    """
    from diffva_ray.evaluate.report.page import write_report
    from diffva_ray.evaluate.report.serve import serve
    from diffva_ray.generate.run import open_run

    opened = open_run(run)
    click.echo(f"open {write_report(opened, images, boxes)}")
    if served:
        serve(opened.store, port, click.echo)


@verb("score")
@click.argument("maps")
@data_option
@click.option("--boxes", metavar="CSV", help="Lesion boxes: file,x,y,w,h in pixels of the image.")
@click.option("--out", metavar="FOLDER", help="Write tables/scores.{csv,md,tex,json} and more there.")
@click.option(
    "--signed/--positive",
    "signed",
    default=None,
    help="Score max(M, 0) and |M|, or max(M, 0) alone; default: by the values.",
)
@click.option(
    "--encoding",
    type=click.Choice(["auto", "signed16", "unsigned"]),
    default="auto",
    show_default=True,
    help="Of 16-bit maps; signed16: 32768 is zero; auto: that for a run's, else unsigned.",
)
@click.option(
    "--smoothing",
    type=click.FloatRange(0, 0.5, max_open=True),
    metavar="F",
    help="Gaussian sigma as a fraction of the side, of maps and baselines; default: none.",
)
@click.option("--size", type=click.IntRange(8, 4096), metavar="PX", help="Side of the grid; default: the maps' own.")
@click.option(
    "--threshold-from",
    metavar="RUN|FOLDER|JSON",
    help="Thresholds fixed on validation images: a run, an --out of this verb, or a file.",
)
@click.option("--model", metavar="MODEL", help="Refuse this model's training images; a run names its own model.")
@click.option("--allow-training-images", is_flag=True, help="Score images the model was trained on; the tables say so.")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def score(maps: str, data: str, boxes: str | None, out: str | None, signed: bool | None,
          encoding: Literal["auto", "signed16", "unsigned"],
          smoothing: float | None, size: int | None, threshold_from: str | None, model: str | None,
          allow_training_images: bool, as_json: bool) -> None:  # fmt: skip
    """Score anybody's attribution maps with the code of our own tables, beside trivial baselines.

    MAPS is a folder of PNG, NPY or TIFF files named like the images of DATA, or a run.

    Example:
        diffva score gradcam/ --data data/test --size 64 --out scores/gradcam
    """
    from diffva_ray.evaluate.external_scores import ScoreOptions, score_maps
    from diffva_ray.evaluate.external_tables import open_output, print_scores, write_scores
    from diffva_ray.evaluate.tables import clean

    output = None if out is None else open_output(out)
    options = ScoreOptions(
        boxes=boxes,
        encoding=encoding,
        signed=signed,
        smoothing=smoothing,
        size=size,
        threshold_from=threshold_from,
        model=model,
        allow_training_images=allow_training_images,
    )
    scored = score_maps(maps, data, options)
    if output is not None:
        write_scores(output, scored)
    if as_json:
        click.echo(json.dumps(clean(scored.metrics), indent=1))
        return
    print_scores(scored.metrics)
    if output is not None:
        click.echo(f"tables in {out}/tables")


@verb("compare")
@click.argument("run_a")
@click.argument("run_b")
@click.option("--out", metavar="FOLDER", help="Where the page goes; default: compare-<A>-<B> beside a local RUN_A.")
def compare(run_a: str, run_b: str, out: str | None) -> None:
    """Two runs on the same images, side by side: numbers, settings that differ, pictures. Neither run is written to.

    Example:
        diffva compare runs/first runs/second
    """
    from diffva_ray.evaluate.comparison import compare_runs, print_comparison
    from diffva_ray.evaluate.report.comparison_page import output_store, write_comparison
    from diffva_ray.generate.run import open_run

    try:
        a, b = open_run(run_a), open_run(run_b)
    except ValueError as error:  # an unknown scheme, or a run.json that is damaged
        raise UnusableData(str(error)) from None
    store = output_store(a, b, out)
    comparison = compare_runs(a, b)
    print_comparison(comparison)
    click.echo(f"open {write_comparison(comparison, store)}")
