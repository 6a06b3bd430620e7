"""Verbs about a run: generate, status, verify, retry."""

from __future__ import annotations

import json
import shlex
from typing import Any

import click

from diffva_ray.commands.dry_run import show
from diffva_ray.commands.verb import (
    DONE,
    INCOMPLETE,
    compose_options,
    composed_prompt,
    data_option,
    data_options,
    dry_run_option,
    echo,
    execution,
    execution_options,
    healthy_option,
    model_option,
    names,
    recipe_option,
    set_option,
    settings_options,
    settings_overrides,
    verb,
    with_flags,
)

FRACTION = "evaluate.max_quarantined_fraction="  # a setting that a run may change


@verb("generate", "Generate counterfactuals for a data set")
@data_option
@data_options
@model_option
@click.option("--out", metavar="RUN", required=True, help="Run folder, local or s3://; an unfinished run continues.")
@click.option("--classes", metavar="A,B", help="Classes whose images are used; default: all but the healthy class.")
@healthy_option
@click.option("--prompt", metavar="TEXT", help="Prompt of the counterfactuals; default: the recipe's healthy prompt.")
@compose_options
@settings_options
@click.option("--seed", type=int, help="Random seed of the run.")
@click.option("--samples", type=int, metavar="K", help="Samples per image, each with its own noise.")
@click.option(
    "--sweep",
    multiple=True,
    metavar="KEY=V,V",
    help="Values of one sampling setting, as in strength=0.4,0.6; repeatable.",
)
@click.option("--limit", type=click.IntRange(1), metavar="N", help="Maximum number of records.")
@click.option("--shard-size", type=int, metavar="N", help="Number of records per shard.")
@click.option("--micro-batch", type=int, metavar="N", help="Number of images per network call.")
@execution_options
@click.option(
    "--probe",
    is_flag=True,
    help="With --dry-run: generate some images here to estimate hours, storage and the best --micro-batch.",
)
@click.option(
    "--images-per-second",
    type=click.FloatRange(0, min_open=True),
    metavar="R",
    help="With --dry-run: the throughput of one actor, to estimate hours.",
)
@recipe_option
@set_option
@dry_run_option
def generate(data: str, model: str, out: str, **options: Any) -> int:
    """Generate the healthy counterfactual and the attribution map of every abnormal image.

    Example:
        diffva generate --data data/test --model models/mine --out runs/first
        diffva generate --data data/test --model models/mine --out runs/both --prompt "COVID 19" --and "Cardiomegaly"
    """
    from diffva_ray.generate.failure_threshold import allow_quarantined, check_quarantine_limit
    from diffva_ray.generate.plan import Request, parse_sweep
    from diffva_ray.generate.run import open_run
    from diffva_ray.model.recipe import model_recipe
    from diffva_ray.workflows.generate import generate_run

    # Resolve recipe and request.
    overrides = with_flags(
        settings_overrides(options, "samples", "shard_size", "micro_batch"),
        data__healthy_class=options["healthy_class"],
        data__columns=options["columns"],
        data__root=options["root"],
    )
    recipe = model_recipe(model, options["recipe"], overrides)
    sweep, prompt = parse_sweep(options["sweep"]), options["prompt"]
    if options["also"] or options["without"]:
        if "prompt" in dict(sweep):
            raise click.UsageError("--and and --not go with --prompt; write AND and NOT into the prompts of --sweep")
        prompt = composed_prompt(recipe.data.healthy_prompt if prompt is None else prompt, options)
    request = Request(names(options["classes"]), prompt, options["limit"], sweep)
    # Print the forecast of a dry run.
    if options["dry_run"]:
        from diffva_ray.generate.cost import Pace
        from diffva_ray.workflows.forecast import micro_batches, planned, planned_cost, probe

        rate, pace, rate_by_size = options["images_per_second"], None, dict[int, float]()
        if rate is not None:
            pace = Pace(1 / rate, None, "cuda")
        elif options["probe"]:
            pace = probe(recipe, data, model, request)
            rate_by_size = micro_batches(recipe, model)
        intent = planned(recipe, data, model, out, request)
        cost = planned_cost(recipe, intent, out, request, execution(options), pace)
        if rate_by_size:
            cost["images_per_second_by_micro_batch"] = {size: round(rate, 2) for size, rate in rate_by_size.items()}
        show(recipe, **intent, cost=cost)
        return DONE
    if options["probe"] or options["images_per_second"]:
        raise click.UsageError("--probe and --images-per-second are for --dry-run only")
    # Generate, then compare the number of quarantined records with the limit.
    echo(f"recipe {recipe.name}" + ("" if options["recipe"] else " (the model's own)"), err=True)
    counts = generate_run(recipe, data, model, out, request, execution(options))
    if counts["shards"]:
        echo(f"{counts['ok']} of {counts['records']} records ok; next: diffva reduce {shlex.quote(out)}")
    made = open_run(out)
    if any(override.startswith(FRACTION) for override in options["overrides"]):
        made = allow_quarantined(made, recipe.evaluate.max_quarantined_fraction)
    check_quarantine_limit(made)
    return DONE


@verb("status", "Show the progress of a run or a training")
@click.argument("run_or_model")
@click.option("--json", "as_json", is_flag=True, help="Print the status as JSON.")
def status(run_or_model: str, as_json: bool) -> None:
    """Show the progress of a run or a training. The command only reads files, so it works from any machine.

    Example:
        diffva status runs/first --json
    """
    from diffva_ray.workflows.status import describe, read_status

    progress = read_status(run_or_model)
    echo(json.dumps(progress, indent=1) if as_json else describe(progress))


@verb("verify", "Check a finished run for damage")
@click.argument("run")
@click.option(
    "--repair", is_flag=True, help="Remove damaged shards from the committed ones, so that generate makes them again."
)
def verify(run: str, repair: bool) -> int:
    """Check a finished run: each planned record exists once, fingerprints match, and pixels match their digests.

    Example:
        diffva verify runs/first
    """
    from diffva_ray.generate.run import open_run
    from diffva_ray.generate.verification import requeue
    from diffva_ray.generate.verification import verify as check

    # Print the problems.
    opened = open_run(run)
    problems = check(opened)
    for problem in problems[:20]:
        echo(f"shard {problem.shard}: {problem.what}" if problem.shard >= 0 else problem.what, err=True)
    if not problems:
        echo(f"{run}: {opened.about['records']} records in {opened.shards} shards, complete and sound")
        return DONE
    echo(f"{run}: {len(problems)} problems" + (f", {len(problems) - 20} not shown" if len(problems) > 20 else ""))
    # Requeue the damaged shards.
    if repair:
        count = requeue(opened, problems)
        redo = "generate" if any(not problem.overlay for problem in problems if problem.shard >= 0) else ""
        verbs = [*filter(None, [redo]), *(["retry"] if any(problem.overlay for problem in problems) else []), "reduce"]
        echo(f"{count} shards requeued; run diffva {', then diffva '.join(verbs)} again")
    return INCOMPLETE


@verb("retry", "Retry the quarantined records of a run")
@click.argument("run")
@click.option("--data", metavar="DATA", help="New address of the data set, if it has moved.")
@click.option("--model", metavar="MODEL", help="New address of the model, if it has moved.")
@execution_options
def retry(run: str, data: str | None, model: str | None, **options: Any) -> int:
    """Generate quarantined records again, after their images are fixed. The results go to RUN/overlays/r1, r2 ...

    Example:
        diffva retry runs/first
    """
    from diffva_ray.generate.failure_threshold import check_quarantine_limit
    from diffva_ray.generate.run import open_run
    from diffva_ray.workflows.generate import retry_run

    opened = open_run(run)
    counts = retry_run(opened, execution(options), data, model)
    if not counts["shards"]:
        echo(f"{run}: no record is quarantined; nothing to retry")
    else:
        echo(f"{counts['ok']} of {counts['records']} records ok now; next: diffva reduce {shlex.quote(run)}")
    check_quarantine_limit(opened)
    return DONE
