"""Verbs for experts: studio, study, readers."""

from __future__ import annotations

import logging
import shlex
import tempfile
from importlib.util import find_spec
from pathlib import Path

import click

from diffva_ray.commands.verb import echo, small_option, verb
from diffva_ray.data.dataset import UnusableData
from diffva_ray.progress import LOG
from diffva_ray.provenance import missing


@verb("study", "Write a blinded reader study of a run")
@click.argument("run")
@click.option("--out", metavar="STUDY", required=True, help="Folder of the study, local or s3://.")
@click.option(
    "--images",
    default=60,
    show_default=True,
    type=click.IntRange(5, 999),
    help="Images that a reader sees, a fifth of them for the second time.",
)
@click.option("--seed", default=0, show_default=True, help="Random seed of the choice and the order.")
def study(run: str, out: str, images: int, seed: int) -> None:
    """Write a blinded set of real images, counterfactuals and reconstructions of a finished run for readers. Give
    readers STUDY/sheet; STUDY/key.csv says what the images are and is not for them.

    Example:
        diffva study runs/first --images 60 --seed 1 --out studies/first
        diffva studio --study studies/first/sheet
        diffva readers studies/first
    """
    from diffva_ray.generate.run import open_run
    from diffva_ray.studio.study import write_study

    counts = write_study(open_run(run), out, images, seed)
    echo(", ".join(f"{count} {kind}" for kind, count in counts.items()))
    sheet, key = shlex.quote(f"{out}/sheet"), shlex.quote(f"{out}/key.csv")
    echo(f"for readers: {sheet}; keep {key} from them; next: diffva studio --study {sheet}")


@verb("readers", "Score the answers of a reader study")
@click.argument("study")
@click.argument("answers", nargs=-1)
def readers(study: str, answers: tuple[str, ...]) -> None:
    """Compute what the readers of a study said about real images, counterfactuals and reconstructions, and how far they
    agree with themselves, with one another and with the model's judge. ANSWERS are CSV files of readers; by default
    those in STUDY/sheet.

    Example:
        diffva readers studies/first
        diffva readers studies/first anna.csv ben.csv
    """
    from diffva_ray.studio.readers import score_readers

    tables = score_readers(study, answers)
    for row in tables["readers"]:
        low, high = row["interval"]
        echo(
            f"{row['reader']}, {row['kind']}, {row['question']}: {row['yes']:.0%} yes ({low:.0%} to {high:.0%}), n {row['n']}"
        )
    for row in tables["agreement"]:
        low, high = row["interval"]
        echo(
            f"{row['what']}, {row['question']}, {row['reader']} and {row['other']}: kappa {row['kappa']:.2f} ({low:.2f} to {high:.2f}), n {row['n']}"
        )
    echo(f"tables in {shlex.quote(study)}/tables")


@verb("studio", "Show a page to ask about images")
@small_option
@click.option(
    "--out",
    default="runs/studio",
    show_default=True,
    metavar="DIR",
    help="Local folder for uploads, results and verdicts.",
)
@click.option("--run", metavar="RUN", help="Show the records of this run, too, and use its model instead of --model.")
@click.option("--service", metavar="URL", help="HTTP service that runs the networks of --model; none is loaded here.")
@click.option("--study", metavar="SHEET", help="Show the sheet of a reader study (STUDY/sheet) and nothing else.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port; default: any free port.")
def studio(model: str, out: str, run: str | None, service: str | None, study: str | None, port: int) -> None:
    """Serve a page on the loopback address, where experts open images, ask for counterfactuals in words, compare them
    and say whether they are right; with --study, where readers answer a study. Nothing leaves this machine, except
    images that are sent to --service, with the token in DIFFVA_SERVE_TOKEN.

    Example:
        diffva studio
        diffva studio --run runs/first --out runs/studio
        diffva studio --model models/mine --service http://127.0.0.1:8000
        diffva studio --study studies/first/sheet
    """
    from diffva_ray.generate.run import open_run
    from diffva_ray.studio import ask_page, pages, read_page
    from diffva_ray.studio.study import open_sheet
    from diffva_ray.studio.workspace import Workspace

    sheet = open_sheet(study) if study else None
    if find_spec("gradio") is None:
        raise UnusableData(missing("gradio", "the studio's page", "studio"))
    folder = None if sheet else pages.local_folder(out)  # a reader uploads nothing
    with tempfile.TemporaryDirectory(prefix=".uploads-", dir=folder) as uploads:
        gradio = pages.import_gradio(uploads)
        if sheet:
            page = read_page.build(gradio, sheet)
        else:
            LOG.setLevel(logging.WARNING)  # the page says itself what it does
            seen = open_run(run) if run else None
            workspace = Workspace(out, seen.about["model"] if seen else model, service=service, run=seen)
            page = ask_page.build(gradio, workspace, Path(uploads), service)
        try:
            pages.serve(gradio, page, port, echo)
        except OSError as error:
            raise click.BadParameter(f"{port}: {error.strerror}", param_hint="--port") from error
