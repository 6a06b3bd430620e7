"""Verbs about a run: make it, watch it, check it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from diffva_ray.commands.verb import (
    DONE,
    INCOMPLETE,
    actors_option,
    change_option,
    data_option,
    dry_run_option,
    executor_option,
    gpus_option,
    model_option,
    names,
    recipe_option,
    set_option,
    settings_options,
    settings_overrides,
    show,
    verb,
    with_flags,
)

if TYPE_CHECKING:
    from diffva_ray.workflows.execution import Executor


@verb("generate")
@data_option
@model_option
@click.option("--out", metavar="RUN", required=True, help="Run folder, or s3://; an unfinished one is continued.")
@click.option("--classes", metavar="A,B", help="Classes to generate; default: all but the healthy one.")
@click.option("--healthy-class", metavar="NAME", help="The class that counts as healthy.")
@click.option(
    "--prompt", metavar="TEXT", help="What the counterfactual should be; default: the recipe's healthy prompt."
)
@settings_options
@click.option("--seed", type=int, help="Seed of the run.")
@click.option("--samples", type=int, metavar="K", help="Records per image, each with noise of its own.")
@click.option("--sweep", multiple=True, metavar="KEY=V,V", help="Several values of one setting; repeatable.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="At most so many records.")
@click.option("--shard-size", type=int, metavar="N", help="Records per shard.")
@click.option("--micro-batch", type=int, metavar="N", help="Images in one network call.")
@actors_option
@gpus_option
@click.option(
    "--probe",
    is_flag=True,
    help="With --dry-run: generate some images here, to tell hours, storage and the best --micro-batch.",
)
@click.option(
    "--images-per-second",
    type=click.FloatRange(0, min_open=True),
    metavar="R",
    help="With --dry-run: the pace of one actor, to tell hours.",
)
@change_option
@executor_option
@recipe_option
@set_option
@dry_run_option
def generate(data: str, model: str, out: str, **options: Any) -> int:
    """Make the healthy counterfactual and the attribution map of every abnormal image.

    Example:
        diffva generate --data data/test --model models/mine --out runs/first
    """
    from diffva_ray.generate.failure_threshold import check_quarantine_limit
    from diffva_ray.generate.plan import Request, parse_sweep
    from diffva_ray.generate.run import open_run
    from diffva_ray.workflows.execution import Execution, model_recipe
    from diffva_ray.workflows.generate import generate_run

    overrides = with_flags(
        settings_overrides(options, "samples", "shard_size", "micro_batch"),
        data__healthy_class=options["healthy_class"],
    )
    recipe = model_recipe(model, options["recipe"], overrides)
    request = Request(names(options["classes"]), options["prompt"], options["limit"], parse_sweep(options["sweep"]))
    execution = Execution(
        executor=options["executor"],
        actors=options["actors"],
        gpus_per_actor=options["gpus_per_actor"],
        allow_environment_change=options["allow_environment_change"],
    )
    if options["dry_run"]:
        from diffva_ray.generate.cost import Pace
        from diffva_ray.workflows.forecast import micro_batches, planned, planned_cost, probe

        rate, pace, by_size = options["images_per_second"], None, dict[int, float]()
        if rate is not None:
            pace = Pace(1 / rate, None, "cuda")
        elif options["probe"]:
            pace = probe(recipe, data, model, request)
            by_size = micro_batches(recipe, model)
        intent = planned(recipe, data, model, out, request)
        cost = planned_cost(recipe, intent, out, request, execution, pace)
        if by_size:
            cost["images_per_second_by_micro_batch"] = {size: round(rate, 2) for size, rate in by_size.items()}
        show(recipe, **intent, cost=cost)
        return DONE
    if options["probe"] or options["images_per_second"]:
        raise click.UsageError("--probe and --images-per-second are for --dry-run, which they tell the pace")
    click.echo(f"recipe {recipe.name}" + ("" if options["recipe"] else " (the model's own)"), err=True)
    counts = generate_run(recipe, data, model, out, request, execution)
    if counts["shards"]:
        click.echo(f"{counts['ok']} of {counts['records']} records ok; next: diffva reduce {out}")
    check_quarantine_limit(open_run(out))
    return DONE


@verb("status")
@click.argument("run_or_model")
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def status(run_or_model: str, as_json: bool) -> None:
    """How far a run or a training is; reads storage only.

    Example:
        diffva status runs/first --json
    """
    from diffva_ray.workflows.status import describe, read_status

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
    from diffva_ray.generate.run import open_run
    from diffva_ray.generate.verification import requeue
    from diffva_ray.generate.verification import verify as check

    opened = open_run(run)
    problems = check(opened)
    for problem in problems[:20]:
        click.echo(f"shard {problem.shard}: {problem.what}" if problem.shard >= 0 else problem.what, err=True)
    if not problems:
        click.echo(f"{run}: {opened.about['records']} records in {opened.shards} shards, complete and sound")
        return DONE
    click.echo(f"{run}: {len(problems)} problems" + (f", {len(problems) - 20} not shown" if len(problems) > 20 else ""))
    if repair:
        again = "retry" if all(problem.overlay for problem in problems) else "generate"
        click.echo(f"{requeue(opened, problems)} shards requeued; run diffva {again} again, then diffva reduce")
    return INCOMPLETE


@verb("retry")
@click.argument("run")
@click.option("--data", metavar="DATA", help="Where the data set is now, if it has moved.")
@click.option("--model", metavar="MODEL", help="Where the model is now, if it has moved.")
@actors_option
@gpus_option
@change_option
@executor_option
def retry(run: str, data: str | None, model: str | None, actors: int | None, gpus_per_actor: float | None,
          allow_environment_change: bool, executor: Executor) -> int:  # fmt: skip
    """Make quarantined records again, once their images are mended: into RUN/overlays/r1, r2 ...

    Example:
        diffva retry runs/first
    """
    from diffva_ray.generate.failure_threshold import check_quarantine_limit
    from diffva_ray.generate.run import open_run
    from diffva_ray.workflows.execution import Execution
    from diffva_ray.workflows.generate import retry_run

    opened = open_run(run)
    execution = Execution(
        executor=executor,
        actors=actors,
        gpus_per_actor=gpus_per_actor,
        allow_environment_change=allow_environment_change,
    )
    counts = retry_run(opened, execution, data, model)
    if not counts["shards"]:
        click.echo(f"{run}: no record is quarantined; nothing to retry")
    else:
        click.echo(f"{counts['ok']} of {counts['records']} records ok now; next: diffva reduce {run}")
    check_quarantine_limit(opened)
    return DONE
