"""What all verbs share: the group, exit codes, one line for every failure, the options they have in common."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce, wraps
from typing import Any, get_args

import click

from diffva_ray._version import __version__
from diffva_ray.config.methods import METHODS
from diffva_ray.config.recipe import Recipe, RecipeError, Scheduler
from diffva_ray.data.dataset import UnusableData
from diffva_ray.generate.run import FingerprintDiffers, PlanError
from diffva_ray.model.card import UnusableModel
from diffva_ray.progress import set_up_logging
from diffva_ray.storage.store import StoreError, UnknownScheme

# Of every verb, too: click keeps a verb's help option from its first call, which may be one without the group.
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
DONE, UNUSABLE, DIFFERS, TOO_MANY_QUARANTINED, INCOMPLETE, INTERRUPTED = 0, 2, 3, 4, 5, 130


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


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="diffva")
@click.option("-v", "--verbose", is_flag=True, help="Say more, and let Ray speak.")
def main(verbose: bool) -> None:
    """Healthy counterfactuals, attribution maps and their numbers for chest X-rays. Not for clinical use."""
    set_up_logging(verbose)


def verb(name: str) -> Callable[[Callable[..., Any]], click.Command]:
    """A subcommand whose failures are one line on stderr and an exit code of the contract."""

    def decorate(function: Callable[..., Any]) -> click.Command:
        @wraps(function)
        def run(**options: Any) -> None:
            codes = exit_codes()
            try:
                with sigterm_interrupts():
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

        return main.command(name, cls=Examples, context_settings=CONTEXT)(run)

    return decorate


def exit_codes() -> dict[type[BaseException], int]:
    """Which failure ends with which exit code of the contract."""
    from diffva_ray.distributed.session import UnusableCluster
    from diffva_ray.evaluate.reduction import Incomplete
    from diffva_ray.generate.attempts import OutOfMemory, WorkersKeepDying
    from diffva_ray.generate.failure_threshold import TooManyQuarantined
    from diffva_ray.generate.run import DamagedRun, Unfinished

    unusable = (
        UnusableCluster,
        RecipeError,
        UnusableData,
        UnusableModel,
        PlanError,
        DamagedRun,
        Unfinished,
        UnknownScheme,
        OSError,
    )
    incomplete = (Incomplete, StoreError, WorkersKeepDying, OutOfMemory)
    return {
        **dict.fromkeys(unusable, UNUSABLE),
        FingerprintDiffers: DIFFERS,
        TooManyQuarantined: TOO_MANY_QUARANTINED,
        **dict.fromkeys(incomplete, INCOMPLETE),
    }


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM (a stopped job, a spot notice, Slurm) ends a command as Ctrl-C does: clean, and to be continued."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # only there may handlers be set
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


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
recipe_or_phantom = click.option("--recipe",   metavar="NAME|FILE", default="phantom", show_default=True, help="A recipe that comes with the package, or a YAML file.")
recipe_option   = click.option("--recipe",     metavar="NAME|FILE", help="Recipe; default: the model's own.")
set_option      = click.option("--set",        "overrides", metavar="KEY=VALUE", multiple=True, help="Override one value of the recipe, as in generate.strength=0.4; repeatable.")
dry_run_option  = click.option("--dry-run",    is_flag=True, help="Print the resolved recipe and what would be done; write nothing.")
data_option     = click.option("--data",       metavar="DATA",  required=True, help="Data set: a folder, a manifest, or s3://.")
model_option    = click.option("--model",      metavar="MODEL", required=True, help="Model folder, or s3://.")
executor_option = click.option("--executor",   type=click.Choice(["ray", "inline"]), default="ray", show_default=True, help="inline: a plain loop in this process.")
actors_option   = click.option("--actors",     type=click.IntRange(1), metavar="N", help="Default: one for each GPU, or for each CPU.")
gpus_option     = click.option("--gpus-per-actor", type=click.FloatRange(0), metavar="F", help="Default: 1 where the cluster has GPUs.")
change_option   = click.option("--allow-environment-change", is_flag=True, help="Go on with another torch or device; recorded.")
weights_option  = click.option("--inception-weights", metavar="PATH|download", help="pytorch-fid's state dict; default: its cache.")
SETTINGS = (  # of the engine: what a run and a single image have in common
    click.option("--method",         metavar="NAME",              help=f"One of {', '.join(METHODS)}."),
    click.option("--strength",       metavar="F",    type=float,  help="How far the image is taken apart, in (0, 1]."),
    click.option("--guidance-scale", metavar="F",    type=float,  help="Classifier-free guidance; 1 or less is none."),
    click.option("--steps",          metavar="N",    type=int,    help="Scheduler steps at strength 1."),
    click.option("--scheduler",      metavar="NAME", help=f"One of {', '.join(get_args(Scheduler))}."),
)
# fmt: on


def settings_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options of SETTINGS, in their order."""
    return reduce(lambda wrapped, option: option(wrapped), reversed(SETTINGS), function)


def settings_overrides(options: Mapping[str, Any], *more: str) -> tuple[str, ...]:
    """``--set`` and ``--seed``, the options of SETTINGS and ``more`` of ``generate``'s as overrides of the recipe."""
    keys = ("method", "strength", "guidance_scale", "scheduler", *more)
    return with_flags(
        options["overrides"],
        seed=options["seed"],
        generate__num_inference_steps=options["steps"],
        **{f"generate__{key}": options[key] for key in keys},
    )


def show(recipe: Recipe, **intent: Any) -> None:
    """What ``--dry-run`` prints: one JSON document."""
    click.echo(json.dumps({"recipe": recipe.model_dump(mode="json"), **intent}, indent=1))


def with_flags(overrides: tuple[str, ...], **flags: Any) -> tuple[str, ...]:
    """``--set`` overrides, then those of options that were given, which win."""
    given = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in flags.items() if value is not None]
    return (*overrides, *given)


def names(text: str | None) -> tuple[str, ...] | None:
    return tuple(name.strip() for name in text.split(",") if name.strip()) if text else None
