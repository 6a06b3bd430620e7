"""What all verbs share: the command group, exit codes, one-line errors and common options."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce, wraps
from typing import TYPE_CHECKING, Any, get_args

import click

from diffva_ray._version import __version__
from diffva_ray.config.methods import METHODS
from diffva_ray.config.prompts import composed
from diffva_ray.config.recipe import RecipeError
from diffva_ray.config.sampling import SamplingSettings, Scheduler
from diffva_ray.data.dataset import UnusableData
from diffva_ray.generate.run import FingerprintDiffers, PlanError
from diffva_ray.model.card import UnusableModel
from diffva_ray.model.packaged import SMALL, model_address
from diffva_ray.progress import LOG, one_line, printable, set_up_logging
from diffva_ray.provenance import missing
from diffva_ray.storage.store import StoreError, UnknownScheme

if TYPE_CHECKING:
    from diffva_ray.workflows.execution import Execution

# Given to every verb, too: click creates a verb's help option at the first call, which may come without the group.
CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
DONE, UNEXPECTED, UNUSABLE, DIFFERS, TOO_MANY_QUARANTINED, INCOMPLETE, INTERRUPTED = 0, 1, 2, 3, 4, 5, 130
PAGES = ("matplotlib", "jinja2")  # packages of the extra `report`
FILE_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)  # with a file name: usage


def echo(text: str, err: bool = False) -> None:
    """Print a text without the escape sequences that labels and file names in it may contain."""
    click.echo(printable(text), err=err)


def _model_address(context: click.Context, option: click.Parameter, value: str) -> str:
    return model_address(value)


MODEL: dict[str, Any] = {
    "metavar": "MODEL",
    "callback": _model_address,
    "help": "Model folder, local or s3://; small: the model that comes with the package.",
}


class VerbCommand(click.Command):
    """Command whose help prints the example of its docstring without reflowing the lines."""

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
@click.option("-v", "--verbose", is_flag=True, help="Log more, show Ray's own log, and print tracebacks of errors.")
def main(verbose: bool) -> None:
    """Generate healthy counterfactuals and attribution maps of chest X-rays and evaluate them. Not for clinical use."""
    set_up_logging(verbose)


def verb(name: str, short_help: str) -> Callable[[Callable[..., Any]], click.Command]:
    """Register a subcommand. It prints an error as one line on stderr and exits with a code of the contract.

    ``short_help``: the line of ``diffva --help``, in the imperative, at most 45 characters.
    """

    def decorate(function: Callable[..., Any]) -> click.Command:
        @wraps(function)
        def run(**options: Any) -> None:
            try:
                with sigterm_interrupts():
                    code = function(**options)
            except KeyboardInterrupt:
                echo("interrupted; all committed work is kept; repeat the command to continue", err=True)
                sys.exit(INTERRUPTED)
            except Exception as error:
                LOG.debug("diffva %s: traceback of the error below", name, exc_info=True)
                known = _known_error(error)
                if known is None:
                    raise
                message, code = known
                echo(f"diffva {name}: {message}", err=True)
                sys.exit(code)
            sys.exit(code or DONE)

        return main.command(name, cls=VerbCommand, short_help=short_help, context_settings=CONTEXT)(run)

    return decorate


def _known_error(error: Exception) -> tuple[str, int] | None:
    """The message and the exit code of an error that users can act on; None for all others, which are bugs."""
    codes = exit_codes()
    origin = getattr(error, "cause", None) or error  # Ray's errors hold the worker's error there
    if isinstance(origin, FILE_ERRORS) and origin.filename is not None:
        return str(origin), UNUSABLE
    if isinstance(origin, ModuleNotFoundError) and origin.name in PAGES:
        return missing(origin.name, "figures and HTML pages", "report"), UNUSABLE
    if cause := _known_cause(error, tuple(codes)):
        return str(cause), next(code for kind, code in codes.items() if isinstance(cause, kind))
    if isinstance(origin, OSError):
        text = f"{type(origin).__name__}: {one_line(origin)}"
        return f"unexpected error: {text}; diffva -v shows the traceback", UNEXPECTED
    return None


def exit_codes() -> dict[type[BaseException], int]:
    """Exit code of the contract by kind of error."""
    from diffva_ray.distributed.session import UnusableCluster
    from diffva_ray.evaluate.reduction import Incomplete
    from diffva_ray.generate.attempts import GpuFailed, OutOfMemory, WorkersKeepDying
    from diffva_ray.generate.failure_threshold import TooManyQuarantined
    from diffva_ray.generate.run import DamagedPart, Unfinished
    from diffva_ray.generate.run_json import DamagedRun

    unusable = (
        UnusableCluster,
        RecipeError,
        UnusableData,
        UnusableModel,
        PlanError,
        DamagedRun,
        Unfinished,
        UnknownScheme,
    )
    incomplete = (DamagedPart, Incomplete, StoreError, WorkersKeepDying, OutOfMemory, GpuFailed)
    return {
        **dict.fromkeys(unusable, UNUSABLE),
        FingerprintDiffers: DIFFERS,
        TooManyQuarantined: TOO_MANY_QUARANTINED,
        **dict.fromkeys(incomplete, INCOMPLETE),
    }


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Turn SIGTERM (a stopped job, a spot notice, Slurm) into KeyboardInterrupt, as Ctrl-C: the command can continue.

    After the interrupt SIGTERM is ignored, because the process is about to end: a second one must change neither the
    last message nor the exit code.
    """

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # Python sets handlers in the main thread only
        yield
        return
    before: Any = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        before = signal.SIG_IGN  # remains in place while Python itself ends, unlike a function
        raise
    finally:
        signal.signal(signal.SIGTERM, before)


def _known_cause(error: BaseException, kinds: tuple[type[BaseException], ...]) -> BaseException | None:
    """The first exception of ``kinds`` among an exception and its causes; Ray wraps exceptions into its own."""
    visited: set[int] = set()
    stack: list[Any] = [error]
    while stack:
        current = stack.pop()
        if current is None or id(current) in visited:
            continue
        visited.add(id(current))
        if isinstance(current, kinds):
            return current
        stack += [current.__cause__, current.__context__, getattr(current, "cause", None)]
        stack += list(getattr(current, "worker_failures", {}).values())
    return None


# fmt: off
recipe_or_phantom = click.option("--recipe",   metavar="NAME|FILE", default="phantom", show_default=True, help="Name of a shipped recipe, or a YAML file.")
recipe_option   = click.option("--recipe",     metavar="NAME|FILE", help="Name of a shipped recipe, or a YAML file; default: the model's own recipe.")
set_option      = click.option("--set",        "overrides", metavar="KEY=VALUE", multiple=True, help="Override one value of the recipe, as in generate.strength=0.4; repeatable.")
dry_run_option  = click.option("--dry-run",    is_flag=True, help="Print the planned work, and the resolved recipe as JSON unless on a terminal; write nothing.")
data_option     = click.option("--data",       metavar="DATA",  required=True, help="Data set: a folder, a manifest (CSV or Parquet), or an s3:// address.")
model_option    = click.option("--model",      required=True, **MODEL)
small_option    = click.option("--model",      default=SMALL, show_default=True, **MODEL)
executor_option = click.option("--executor",   type=click.Choice(["ray", "inline"]), default="ray", show_default=True, help="Run on Ray, or in a plain loop of this process (inline).")
actors_option   = click.option("--actors",     type=click.IntRange(1), metavar="N", help="Number of Ray actors; default: one per GPU, or one per CPU without GPUs.")
gpus_option     = click.option("--gpus-per-actor", type=click.FloatRange(0), metavar="F", help="GPUs per actor; default: 1 if the cluster has GPUs, else 0.")
type_option     = click.option("--accelerator-type", metavar="NAME", help="Type of GPU, as Ray names it (A100); default: the cluster's most numerous one.")
change_option   = click.option("--allow-environment-change", is_flag=True, help="Continue a run with another torch version or device; the run records the change.")
columns_option  = click.option("--columns",    metavar="ROLE=NAME,...", help="Columns of a table, as image=Path,label=Finding,patient=PatientID.")
root_option     = click.option("--root",       metavar="FOLDER", help="Folder of the images that a table names; default: its own.")
healthy_option  = click.option("--healthy-class", metavar="NAME", help="Name of the healthy class of the data set; default: the recipe's.")
weights_option  = click.option("--inception-weights", metavar="PATH|download", help="State dict of pytorch-fid's Inception; default: the file in pytorch-fid's cache.")
boxes_option    = click.option("--boxes",      metavar="CSV", help="CSV of lesion boxes: file,x,y,w,h in pixels of the image.")
brixia_option   = click.option("--brixia",     metavar="CSV", help="CSV of Brixia zone scores: file, S-A to S-F, J-A to J-F.")
sources_option  = click.option("--sources",    metavar="CSV", help="CSV of each image's archive: file,source; adds distances per archive.")
SAMPLING = (  # the fields of SamplingSettings, which `generate`, `explain` and `interpolate` share
    click.option("--method",         metavar="NAME",              help=f"Counterfactual method: {', '.join(METHODS)}."),
    click.option("--strength",       metavar="F",    type=float,  help="Share of the noise schedule that is applied to the image, in (0, 1]."),
    click.option("--guidance-scale", metavar="F",    type=float,  help="Scale of classifier-free guidance; 1 or less turns guidance off."),
    click.option("--steps",          "num_inference_steps", metavar="N",    type=int,    help="Sampler steps at strength 1; strength * N steps run."),
    click.option("--scheduler",      metavar="NAME", help=f"Sampler: {', '.join(get_args(Scheduler))}."),
)
# fmt: on


def data_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of a data set that is a table; they are the keys ``columns`` and ``root`` of section ``data``."""
    return columns_option(root_option(function))


def settings_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options of SAMPLING to a verb, in their order."""
    return reduce(lambda wrapped, option: option(wrapped), reversed(SAMPLING), function)


def composed_prompt(prompt: str, options: Mapping[str, Any]) -> str:
    """The prompt with the texts of ``--and`` and ``--not``. Raises UsageError."""
    try:
        return composed(prompt, options["also"], options["without"])
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def compose_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that ``composed_prompt`` reads to a verb."""
    also = click.option(
        "--and", "also", multiple=True, metavar="TEXT", help="Another text to go to, beside --prompt; repeatable."
    )
    without = click.option(
        "--not", "without", multiple=True, metavar="TEXT", help="A text to go away from, beside --prompt; repeatable."
    )
    return also(without(function))


def execution_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that ``execution`` reads to a verb."""
    options = (actors_option, gpus_option, type_option, change_option, executor_option)
    return reduce(lambda wrapped, option: option(wrapped), reversed(options), function)


def execution(options: Mapping[str, Any]) -> Execution:
    """Where and how a run executes, from the options of ``execution_options``."""
    from diffva_ray.workflows.execution import Execution

    keys = ("executor", "actors", "gpus_per_actor", "accelerator_type", "allow_environment_change")
    return Execution(**{key: options[key] for key in keys})


def settings_overrides(options: Mapping[str, Any], *more: str) -> tuple[str, ...]:
    """Recipe overrides from ``--set``, ``--seed``, the options of SAMPLING and ``more`` keys of section ``generate``."""
    keys = (*SamplingSettings.model_fields, *more)
    of_generate = {f"generate__{key}": options[key] for key in keys}
    return with_flags(options["overrides"], seed=options["seed"], **of_generate)


def with_flags(overrides: tuple[str, ...], **flags: Any) -> tuple[str, ...]:
    """Append the options that were given (not None) to the ``--set`` overrides; the later override wins."""
    given = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in flags.items() if value is not None]
    return (*overrides, *given)


def names(text: str | None) -> tuple[str, ...] | None:
    """Split ``A,B`` into names; None for no text."""
    return tuple(name.strip() for name in text.split(",") if name.strip()) if text else None
