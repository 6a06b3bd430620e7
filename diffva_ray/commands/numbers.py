"""Verbs about metrics and pages: reduce, report, score, compare."""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

import click

from diffva_ray.commands.verb import (
    boxes_option,
    brixia_option,
    data_option,
    data_options,
    echo,
    executor_option,
    sources_option,
    verb,
    weights_option,
    with_flags,
)
from diffva_ray.config.recipe import load_recipe
from diffva_ray.data.dataset import UnusableData

if TYPE_CHECKING:
    from diffva_ray.workflows.execution import Executor

# fmt: off
moved_option     = click.option("--data",           metavar="DATA", help="New address of the data set, if it has moved; the run stores it.")
elsewhere_option = click.option("--data",           metavar="DATA", help="New address of the data set, if it has moved; for this page only.")
reference_option = click.option("--reference",      metavar="LABEL=DATA_OR_RUN", multiple=True, help="Reference set of class LABEL for FID and KID; repeatable.")
resize_option    = click.option("--resize",         type=click.Choice(["clean", "legacy"]), help="Resizing before Inception: bicubic with antialiasing (clean), or as pytorch-fid (legacy); default: the recipe's.")
threshold_option = click.option("--threshold-from", metavar="RUN", help="Validation run: thresholds, learned prior and settings of the baselines are chosen on it.")
normals_option   = click.option("--normals",        metavar="DATA", help="Data set with normal images for the PCA baseline; default: the reference set's.")
extractor_option = click.option("--extractor",      "extractors", metavar="NAME[=PATH]", multiple=True, help="Feature extractor: inception, torchxrayvision=WEIGHTS, rad-dino=FOLDER, judge[=MODEL], stand-in; repeatable.")
judge_option     = click.option("--judge",          "judges", metavar="NAME=PATH", multiple=True, help="Additional judge of the flip rate: torchxrayvision=WEIGHTS or judge=MODEL; repeatable.")
lpips_option     = click.option("--lpips-weights",  "lpips", metavar="PATH", help="State dict of torchvision's AlexNet; adds LPIPS to the tables.")
accept_option    = click.option("--max-quarantined-fraction", metavar="F", type=click.FloatRange(0, 1), help="Accept a run with this fraction of quarantined records; the run stores it.")
nameless_option  = click.option("--anonymise-names", is_flag=True, help="Replace the names of image files by ids.")
track_option     = click.option("--log-to",         "trackers", type=click.Choice(["mlflow", "wandb"]), multiple=True, help="Send numbers, tables and figures to this tracker, too; the run must be reduced.")
images_option    = click.option("--images",         metavar="N", type=click.IntRange(1), help="Maximum number of records in the viewer; default: depends on their size, up to 20000.")
scores_option    = click.option("--out",            metavar="FOLDER", help="Output folder; the tables go to tables/scores.{csv,md,tex,json}.")
signed_option    = click.option("--signed/--positive", "signed", default=None, help="Score max(M, 0) and |M|, or max(M, 0) only; default: signed if any value is negative.")
encoding_option  = click.option("--encoding",       type=click.Choice(["auto", "signed16", "unsigned"]), default="auto", show_default=True, help="Encoding of 16-bit maps; signed16: 32768 is zero; auto: signed16 for a run, else unsigned.")
smoothing_option = click.option("--smoothing",      metavar="F", type=click.FloatRange(0, 0.5, max_open=True), help="Sigma of the Gaussian that smooths maps and baselines, as a fraction of the side; default: none.")
size_option      = click.option("--size",           metavar="PX", type=click.IntRange(8, 4096), help="Side of the grid in pixels; default: the size of the maps.")
fixed_option     = click.option("--threshold-from", metavar="RUN|FOLDER|JSON", help="Thresholds from validation images: a run (which also gives the baselines their settings), an --out folder of this verb, or a JSON file.")
trained_option   = click.option("--model",          metavar="MODEL", help="Refuse training images of this model; default for a run: the run's model.")
# fmt: on


@verb("reduce", "Compute the tables of a run")
@click.argument("run")
@moved_option
@reference_option
@boxes_option
@weights_option
@resize_option
@threshold_option
@normals_option
@extractor_option
@judge_option
@lpips_option
@brixia_option
@sources_option
@accept_option
@executor_option
def reduce(run: str, data: str | None, executor: Executor, reference: tuple[str, ...], inception_weights: str | None,
           resize: str | None, max_quarantined_fraction: float | None, **options: Any) -> None:  # fmt: skip
    """Verify a run and write its tables, quarantine.parquet, manifest.json and _SUCCESS.

    Example:
        diffva reduce runs/first --reference Normal=data/test
        diffva reduce runs/first --extractor rad-dino=weights/rad-dino --extractor judge
    """
    from diffva_ray.evaluate.options import Options, inception_path, parse_references
    from diffva_ray.evaluate.summary import print_summary
    from diffva_ray.generate.failure_threshold import allow_quarantined
    from diffva_ray.generate.run import open_run
    from diffva_ray.workflows.reduce import reduce

    opened = open_run(run)
    if max_quarantined_fraction is not None:
        opened = allow_quarantined(opened, max_quarantined_fraction)
    options |= {"references": parse_references(reference), "weights": inception_path(inception_weights)}
    options["resize"] = resize or opened.recipe.evaluate.resize
    reduced = reduce(opened, Options(**options), executor, data)
    print_summary(reduced.metrics)
    state = "" if reduced.fresh else " (already up to date; nothing written)"
    echo(f"tables in {run}/tables{state}; next: diffva report {shlex.quote(run)}")


@verb("report", "Write the HTML report of a run")
@click.argument("run")
@elsewhere_option
@click.option("--boxes", metavar="CSV", help="CSV of lesion boxes to outline: file,x,y,w,h in pixels of the image.")
@click.option("--serve", "served", is_flag=True, help="Serve the report on the loopback address until Ctrl-C.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port for --serve; default: any free port.")
@images_option
@nameless_option
@track_option
def report(run: str, data: str | None, boxes: str | None, served: bool, port: int, images: int | None,
           anonymise_names: bool, trackers: tuple[str, ...]) -> None:  # fmt: skip
    """Write the figures and the HTML report of a finished or unfinished run: one page that opens from disk, with an
    image viewer. Images of an earlier report are reused if they are still valid.

    Example:
        diffva report runs/first
        diffva report runs/first --log-to mlflow
    """
    from diffva_ray.evaluate.report.page import write_report
    from diffva_ray.evaluate.report.serve import serve
    from diffva_ray.evaluate.trackers import check, log_to
    from diffva_ray.generate.data_identity import moved
    from diffva_ray.generate.run import open_run

    opened = open_run(run) if data is None else moved(open_run(run), data)
    for tracker in trackers:
        check(tracker, opened)
    echo(f"open {write_report(opened, images, boxes, anonymise_names)}")
    for tracker in trackers:
        echo(f"sent to {tracker}: {log_to(tracker, opened)}")
    if served:
        try:
            serve(opened.store, port, echo)
        except OSError as error:
            raise click.BadParameter(f"{port}: {error.strerror}", param_hint="--port") from error


@verb("score", "Score attribution maps of any method")
@click.argument("maps")
@data_option
@data_options
@boxes_option
@scores_option
@signed_option
@encoding_option
@smoothing_option
@size_option
@fixed_option
@trained_option
@click.option("--allow-training-images", is_flag=True, help="Score training images, too; the tables note it.")
@click.option("--json", "as_json", is_flag=True, help="Print the scores as JSON.")
def score(maps: str, data: str, columns: str | None, root: str | None, out: str | None, as_json: bool,
          **options: Any) -> None:  # fmt: skip
    """Score attribution maps of any method with the localization metrics of reduce, beside simple baselines.

    MAPS is a folder of PNG, NPY or TIFF files that are named like the images of DATA, or a run.

    Example:
        diffva score gradcam/ --data data/test --size 64 --out scores/gradcam
    """
    from diffva_ray.evaluate.external_scores import ScoreOptions, score_maps
    from diffva_ray.evaluate.external_tables import open_output, print_scores, write_scores
    from diffva_ray.evaluate.tables import clean

    # Open the output folder first, so that a wrong address fails before the work.
    output = None if out is None else open_output(out)
    config = load_recipe("phantom", with_flags((), data__columns=columns, data__root=root)).data
    scored = score_maps(maps, data, ScoreOptions(**options, data=config))
    # Write and print the scores.
    if output is not None:
        write_scores(output, scored)
    if as_json:
        echo(json.dumps(clean(scored.metrics), indent=1))
        return
    print_scores(scored.metrics)
    if output is not None:
        echo(f"tables in {out}/tables")


@verb("compare", "Compare two runs on the same images")
@click.argument("run_a")
@click.argument("run_b")
@elsewhere_option
@click.option("--out", metavar="FOLDER", help="Output folder; default: compare-<A>-<B> beside a local RUN_A.")
@nameless_option
def compare(run_a: str, run_b: str, data: str | None, out: str | None, anonymise_names: bool) -> None:
    """Compare two runs on the same images: metrics, settings that differ, images. Neither run is changed.

    Example:
        diffva compare runs/first runs/second
    """
    from diffva_ray.evaluate.anonymous import image_id
    from diffva_ray.evaluate.comparison import compare_runs
    from diffva_ray.evaluate.report.comparison_page import output_store, print_comparison, write_comparison
    from diffva_ray.generate.data_identity import moved
    from diffva_ray.generate.run import open_run

    try:
        a, b = open_run(run_a), open_run(run_b)
    except ValueError as error:  # an unknown scheme, or a damaged run.json
        raise UnusableData(str(error)) from None
    a, b = (run if data is None else moved(run, data) for run in (a, b))
    store = output_store(a, b, out)
    comparison = compare_runs(a, b)
    if anonymise_names:
        comparison.pairs["image_path"] = comparison.pairs["image_path"].map(image_id)
    print_comparison(comparison)
    echo(f"open {write_comparison(comparison, store)}")
