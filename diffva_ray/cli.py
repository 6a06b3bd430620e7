"""``diffva VERB``: one command per verb. The scripts in jobs/ are the same commands, for ``ray job submit``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import click

from diffva_ray import __version__
from diffva_ray.config import Recipe, RecipeError, load_recipe
from diffva_ray.data.films import UnusableData
from diffva_ray.generate.plan import FingerprintDiffers, PlanError
from diffva_ray.model.card import UnusableModel
from diffva_ray.observe import set_up_logging

DONE, UNUSABLE, DIFFERS, OVER_BUDGET, INCOMPLETE, INTERRUPTED = 0, 2, 3, 4, 5, 130


class Examples(click.Command):
    """A command whose help ends with its docstring's example as it stands."""

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        text, _, example = (self.help or "").partition("Example:")
        formatter.write_paragraph()
        with formatter.indentation():
            formatter.write_text(" ".join(text.split()))
        if example:
            formatter.write_paragraph()
            with formatter.indentation():
                formatter.write("".join(f"  {line.strip()}\n" for line in ["Example:", *example.strip().splitlines()]))


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="diffva")
@click.option("-v", "--verbose", is_flag=True, help="Say more, and let Ray speak.")
def main(verbose: bool) -> None:
    """Healthy twins, attribution maps and honest numbers for chest X-rays. Not for clinical use."""
    set_up_logging(verbose)


def verb(name: str) -> Callable[[Callable[..., Any]], click.Command]:
    """A subcommand whose failures are one line on stderr and an exit code of the contract."""

    def decorate(function: Callable[..., Any]) -> click.Command:
        @wraps(function)
        def run(**options: Any) -> None:
            from diffva_ray.evaluate.reduction import Incomplete
            from diffva_ray.generate.budget import OverBudget
            from diffva_ray.generate.plan import Unfinished

            codes: dict[type[BaseException], int] = {
                RecipeError: UNUSABLE,
                UnusableData: UNUSABLE,
                UnusableModel: UNUSABLE,
                PlanError: UNUSABLE,
                Unfinished: UNUSABLE,
                OSError: UNUSABLE,
                FingerprintDiffers: DIFFERS,
                OverBudget: OVER_BUDGET,
                Incomplete: INCOMPLETE,
            }
            try:
                code = function(**options)
            except KeyboardInterrupt:
                click.echo("interrupted; all committed work is kept, the same command goes on", err=True)
                sys.exit(INTERRUPTED)
            except tuple(codes) as error:
                click.echo(f"diffva {name}: {error}", err=True)
                sys.exit(next(code for kind, code in codes.items() if isinstance(error, kind)))
            except Exception as error:
                cause = _known_cause(error, tuple(codes))
                if cause is None:
                    raise
                click.echo(f"diffva {name}: {cause}", err=True)
                sys.exit(next(code for kind, code in codes.items() if isinstance(cause, kind)))
            sys.exit(code or DONE)

        return main.command(name, cls=Examples)(run)

    return decorate


def _known_cause(error: BaseException, kinds: tuple[type[BaseException], ...]) -> BaseException | None:
    """The exception of ours that Ray has wrapped into its own, if there is one."""
    seen: set[int] = set()
    stack: list[Any] = [error]
    while stack:
        current = stack.pop()
        if current is None or id(current) in seen:
            continue
        seen.add(id(current))
        if isinstance(current, kinds) and not isinstance(current, OSError):
            return current
        stack += [current.__cause__, current.__context__, getattr(current, "cause", None)]
        stack += list(getattr(current, "worker_failures", {}).values())
    return None


# fmt: off
recipe_option   = click.option("--recipe",     metavar="NAME|FILE", help="Recipe; default: the model's own.")
set_option      = click.option("--set",        "overrides", metavar="KEY=VALUE", multiple=True, help="Override one value of the recipe, as in generate.strength=0.4; repeatable.")
dry_run_option  = click.option("--dry-run",    is_flag=True, help="Print the resolved recipe and what would be done; write nothing.")
data_option     = click.option("--data",       metavar="DATA",  required=True, help="Data set: a folder, a manifest, or s3://.")
model_option    = click.option("--model",      metavar="MODEL", required=True, help="Model folder, or s3://.")
executor_option = click.option("--executor",   type=click.Choice(["ray", "inline"]), default="ray", show_default=True, help="inline: a plain loop in this process.")
# fmt: on


def show(recipe: Recipe, **intent: Any) -> None:
    """What ``--dry-run`` prints: one JSON document."""
    click.echo(json.dumps({**intent, "recipe": recipe.model_dump(mode="json")}, indent=1))


def with_flags(overrides: tuple[str, ...], **flags: Any) -> tuple[str, ...]:
    """``--set`` overrides, then those of options that were given, which win."""
    given = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in flags.items() if value is not None]
    return (*overrides, *given)


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


@verb("phantoms")
@click.argument("out")
@click.option("--patients", default=400, show_default=True, metavar="N", help="Films in all, classes in turn.")
@click.option("--size", metavar="PX", type=click.IntRange(16, 4096), help="Side of the films; default: the recipe's.")
@click.option("--seed", default=0, show_default=True, help="The same seed gives the same films.")
@click.option("--classes", metavar="A,B", help="Classes; default: Normal, Lung_Opacity, COVID, Viral Pneumonia.")
@recipe_option
@set_option
@dry_run_option
def phantoms(out: str, patients: int, size: int | None, seed: int, classes: str | None, recipe: str | None,
             overrides: tuple[str, ...], dry_run: bool) -> None:  # fmt: skip
    """Write synthetic thorax films with lung masks, lesion masks and lesion-free twins.

    Example:
        diffva phantoms data/test --patients 400 --size 128 --seed 7
    """
    from diffva_ray.data.phantoms import CLASSES, phantom_set
    from diffva_ray.storage import open_store

    resolved = load_recipe(recipe or "phantom", overrides)
    chosen = _names(classes) or CLASSES
    side = size or resolved.model.resolution
    if dry_run:
        return show(resolved, out=out, patients=patients, size=side, seed=seed, classes=chosen)
    try:
        made = sum(1 for _ in phantom_set(open_store(out), patients, side, seed, chosen))
    except ValueError as error:
        raise UnusableData(str(error)) from None
    click.echo(f"{made} films of {side} px in {out}")


@verb("inspect")
@click.argument("data")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@recipe_option
@set_option
def inspect(data: str, as_json: bool, recipe: str | None, overrides: tuple[str, ...]) -> None:
    """What a data set holds: classes, sizes, masks, unreadable files, near-duplicates.

    Example:
        diffva inspect data/COVID-19_Radiography_Dataset
    """
    from diffva_ray.data.datasets import open_dataset
    from diffva_ray.data.inspection import describe_findings
    from diffva_ray.data.inspection import inspect as examine

    found = examine(open_dataset(data, load_recipe(recipe or "phantom", overrides).data))
    click.echo(json.dumps(found, indent=1) if as_json else describe_findings(found))


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


@verb("generate")
@data_option
@model_option
@click.option("--out", metavar="RUN", required=True, help="Run folder, or s3://; an unfinished one is continued.")
@click.option("--classes", metavar="A,B", help="Classes to heal; default: all but the healthy one.")
@click.option("--healthy-class", metavar="NAME", help="The class that counts as healthy.")
@click.option("--prompt", metavar="TEXT", help="What the twin should be; default: the recipe's healthy prompt.")
@click.option("--method", metavar="NAME", help="sdedit or ddim-inversion.")
@click.option("--strength", type=float, metavar="F", help="How far the film is taken apart, in (0, 1].")
@click.option("--guidance-scale", type=float, metavar="F", help="Classifier-free guidance; 1 or less is none.")
@click.option("--steps", type=int, metavar="N", help="Scheduler steps at strength 1.")
@click.option("--scheduler", metavar="NAME", help="pndm, pndm-diffusers or ddim.")
@click.option("--seed", type=int, help="Seed of the run.")
@click.option("--draws", type=int, metavar="K", help="Records per film, each with noise of its own.")
@click.option("--sweep", multiple=True, metavar="KEY=V,V", help="Several values of one setting; repeatable.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="At most so many records.")
@click.option("--shard-size", type=int, metavar="N", help="Records per shard.")
@click.option("--micro-batch", type=int, metavar="N", help="Films in one network call.")
@click.option("--actors", type=click.IntRange(1), metavar="N", help="Default: one for each GPU, or for each CPU.")
@click.option("--gpus-per-actor", type=click.FloatRange(0), metavar="F", help="Default: 1 where the cluster has GPUs.")
@click.option("--allow-environment-change", is_flag=True, help="Go on with another torch or device; recorded.")
@executor_option
@recipe_option
@set_option
@dry_run_option
def generate(data: str, model: str, out: str, **options: Any) -> int:
    """Make the healthy twin and the attribution map of every abnormal film.

    Example:
        diffva generate --data data/test --model models/mine --out runs/first
    """
    from diffva_ray.generate.budget import check_budget
    from diffva_ray.generate.plan import Request, parse_sweep
    from diffva_ray.pipeline import Execution, existing_run, generate_run, model_recipe

    flags = {
        "data__healthy_class": options["healthy_class"],
        "seed": options["seed"],
        "generate__num_inference_steps": options["steps"],
        **{
            f"generate__{key}": options[key]
            for key in ("method", "strength", "guidance_scale", "scheduler", "draws", "shard_size", "micro_batch")
        },
    }
    recipe = model_recipe(model, options["recipe"], with_flags(options["overrides"], **flags))
    request = Request(_names(options["classes"]), options["prompt"], options["limit"], parse_sweep(options["sweep"]))
    execution = Execution(
        options["executor"], options["actors"], options["gpus_per_actor"], options["allow_environment_change"]
    )
    if options["dry_run"]:
        from diffva_ray.pipeline import planned

        show(recipe, **planned(recipe, data, out, request))
        return DONE
    click.echo(f"recipe {recipe.name}" + ("" if options["recipe"] else " (the model's own)"), err=True)
    counts = generate_run(recipe, data, model, out, request, execution)
    if counts["shards"]:
        click.echo(f"{counts['ok']} of {counts['records']} records ok; next: diffva reduce {out}")
    check_budget(existing_run(out))
    return DONE


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


@verb("status")
@click.argument("run_or_model")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def status(run_or_model: str, as_json: bool) -> None:
    """How far a run or a training is; reads storage only.

    Example:
        diffva status runs/first --json
    """
    from diffva_ray.status import describe, read_status

    found = read_status(run_or_model)
    click.echo(json.dumps(found, indent=1) if as_json else describe(found))


@verb("verify")
@click.argument("run")
@click.option("--repair", is_flag=True, help="Withdraw damaged shards, so that generate makes them again.")
def verify(run: str, repair: bool) -> int:
    """Check every promise of a finished run: planned ids once, fingerprints, pixels.

    Example:
        diffva verify runs/first
    """
    from diffva_ray.generate.verification import requeue
    from diffva_ray.generate.verification import verify as check
    from diffva_ray.pipeline import existing_run

    opened = existing_run(run)
    problems = check(opened)
    for problem in problems[:20]:
        click.echo(f"shard {problem.shard}: {problem.what}", err=True)
    if not problems:
        click.echo(f"{run}: {opened.about['records']} records in {opened.shards} shards, complete and sound")
        return DONE
    click.echo(f"{run}: {len(problems)} problems" + (f", {len(problems) - 20} not shown" if len(problems) > 20 else ""))
    if repair:
        click.echo(f"{len(requeue(opened, problems))} shards requeued; run diffva generate again")
    return INCOMPLETE


def _names(text: str | None) -> tuple[str, ...] | None:
    return tuple(name.strip() for name in text.split(",") if name.strip()) if text else None


if __name__ == "__main__":
    main()
