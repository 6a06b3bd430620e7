"""From images and a model to the paper's tables, figures and one page, through ordinary runs below ``OUT/runs``.

The same command again goes on, or does nothing. What cannot be made is a line with its reason, never a hole.
"""

from __future__ import annotations

import json
from typing import Any

from diffva_ray._version import __version__
from diffva_ray.config.recipe import Recipe, RecipeError, fingerprint_difference
from diffva_ray.data.dataset import UnusableData
from diffva_ray.data.datasets import open_dataset
from diffva_ray.distributed import session
from diffva_ray.evaluate.annotations import lesion_boxes
from diffva_ray.evaluate.options import Options
from diffva_ray.generate.failure_threshold import TooManyQuarantined
from diffva_ray.generate.plan import PromptTooLong
from diffva_ray.generate.run import FingerprintDiffers, open_run
from diffva_ray.model.card import UnusableModel, read_card
from diffva_ray.paper.experiments import EXPERIMENTS, Experiment, settings_recipe
from diffva_ray.paper.inputs import copy_images, drawn, limited, phantom_chexpert, phantom_radiography
from diffva_ray.paper.state import Inputs, Made
from diffva_ray.progress import LOG
from diffva_ray.storage.store import Store, join, open_store
from diffva_ray.workflows.execution import model_recipe
from diffva_ray.workflows.generate import generate_run
from diffva_ray.workflows.reduce import reduce

GUARD, SUCCESS = "paper.json", "_SUCCESS"
QUICK = 24  # images of each class
FEW = 3  # healthy images of the figures with several prompts
CARDIOMEGALY = "Cardiomegaly"


def run_paper(options: Inputs) -> str:
    """Make everything and return where the page is. Raises UnusableData, UnusableModel, RecipeError, FingerprintDiffers
    (``out`` holds another model's or other images' paper), and what generate and reduce raise."""
    from diffva_ray.paper.page import write_page

    store, base, card = _open(options)
    _guard(store, options, card)
    state = {key: getattr(options, key) for key in ("weights", "resize", "boxes", "brixia")} | {"version": __version__}
    page = join(store.uri, "index.html")
    if store.exists(SUCCESS) and json.loads(store.read(SUCCESS)) == state:
        LOG.info("%s: everything is made; nothing to do", store.uri)
        return page
    store.delete(SUCCESS)
    made = _images(store, base, card, options)
    if options.execution.executor == "inline":
        _runs(made)
    else:
        with session.connect():
            _runs(made)
    write_page(made)
    store.put(SUCCESS, json.dumps(state).encode())
    return page


def planned_paper(options: Inputs) -> dict[str, Any]:
    """What ``run_paper`` would do, for ``--dry-run``; nothing is written."""
    _, base, card = _open(options)
    runs = []
    for experiment in EXPERIMENTS:
        recipe = settings_recipe(base, experiment, options.overrides)
        runs.append(
            {
                "run": f"runs/{experiment.name}",
                "makes": experiment.shows,
                "images": experiment.images,
                "prompts": list(experiment.prompts) or [recipe.data.healthy_prompt],
                "recipe": recipe.name,
                **{key: getattr(recipe.generate, key) for key in
                   ("method", "scheduler", "strength", "guidance_scale", "num_inference_steps")},
                "assumed": list(recipe.assumed),
            }
        )  # fmt: skip
    return {
        "out": options.out,
        "radiography": options.radiography or "phantoms",
        "chexpert": options.chexpert or ("phantoms" if options.quick else None),
        "model_digest": card["digest"],
        "images_per_class": _per_class(options),
        "runs": runs,
    }


def _open(options: Inputs) -> tuple[Store, Recipe, dict[str, Any]]:
    if options.radiography is None and not options.quick:
        raise UnusableData("--radiography: name the COVID-19 Radiography Database, or give --quick to use phantoms")
    for uri in (options.radiography, options.chexpert):
        if uri is not None:
            open_dataset(uri)  # before anything is written: a wrong path must not claim the folder
    card = read_card(open_store(options.model))
    if card is None:
        raise UnusableModel(f"--model {options.model}: no diffva.json there; train a model first")
    base = model_recipe(options.model, options.recipe, options.overrides)
    if base.model != model_recipe(options.model, options.recipe, ()).model:
        raise RecipeError("--set model.…: diffva paper shows a model as it is; train another one instead")
    return open_store(options.out), base, card


def _per_class(options: Inputs) -> int | None:
    if options.limit is not None:
        return options.limit
    return QUICK if options.quick else None


def _guard(store: Store, options: Inputs, card: dict[str, Any]) -> None:
    """Refuse to mix two papers in one folder; weights and resize path may change, they are of the tables alone."""
    now = {
        "radiography": options.radiography,
        "chexpert": options.chexpert,
        "model_digest": card["digest"],
        "images_per_class": _per_class(options),
        "recipe": options.recipe,
        "set": list(options.overrides),
    }
    if not store.put_if_absent(GUARD, json.dumps(now, indent=1).encode()):
        before = json.loads(store.read(GUARD))
        changed = fingerprint_difference(before, now)
        if changed:
            raise FingerprintDiffers(store.uri, changed, before, now)


def _images(store: Store, base: Recipe, card: dict[str, Any], options: Inputs) -> Made:
    """The images, in place; the reasons for those that are not there are kept."""
    per_class, size = _per_class(options), base.model.resolution
    place = join(store.uri, "data")
    healthy = base.data.healthy_class
    if options.radiography is None:
        radiography = phantom_radiography(join(place, "radiography"), per_class or QUICK, size)
    else:
        radiography = limited(options.radiography, base.data, None, per_class, join(place, "radiography"))
    made = Made(store, base, card, radiography, None, options)
    dataset = open_dataset(radiography, base.data)
    made.notes += [f"images: {note}" for note in dataset.notes]
    made.boxes = lesion_boxes(radiography, options.boxes, made.notes)
    if healthy not in dataset.classes:
        raise UnusableData(f"--radiography {options.radiography}: no image of the healthy class {healthy}")
    if len(dataset.classes) == 1:
        raise UnusableData(f"--radiography {options.radiography}: no image of an abnormal class")
    made.chexpert = _chexpert(made, join(place, "chexpert"), per_class, size)
    few = drawn([image for image in dataset.images if image.label == healthy and image.size >= 0], FEW)
    copy_images(dataset, few, join(place, "few"))
    return made


def _chexpert(made: Made, place: str, per_class: int | None, size: int) -> str | None:
    options = made.options
    if options.chexpert is None and options.quick and options.radiography is None:
        return phantom_chexpert(place, per_class or QUICK, size)
    what = "table 4, real cardiomegaly against generated"
    if options.chexpert is None:
        made.missing.append((what, "no CheXpert given (--chexpert)"))
        return None
    try:
        uri = limited(options.chexpert, made.base.data, [CARDIOMEGALY], per_class, place)
        made.notes += [f"CheXpert: {note}" for note in open_dataset(options.chexpert, made.base.data).notes]
        return uri
    except UnusableData as error:
        made.missing.append((what, str(error)))
        return None


def _runs(made: Made) -> None:
    """Generate and reduce, one experiment after the other; finished ones are found finished."""
    for number, experiment in enumerate(EXPERIMENTS, 1):
        LOG.info("run %d of %d: %s (%s)", number, len(EXPERIMENTS), experiment.name, experiment.shows)
        try:
            _run(made, experiment)
        except (TooManyQuarantined, PromptTooLong) as error:
            if experiment.images == "abnormal":
                raise
            made.missing.append((experiment.shows, str(error)))  # a prompt too long for this model, say


def _run(made: Made, experiment: Experiment) -> None:
    """Generate and reduce one experiment."""
    recipe = settings_recipe(made.base, experiment, made.options.overrides)
    data = join(made.store.uri, "data", "few") if experiment.images == "few healthy" else made.radiography
    out = join(made.store.uri, "runs", experiment.name)
    request = experiment.request(made.base.data.healthy_class)
    generate_run(recipe, data, made.options.model, out, request, made.options.execution)
    run = open_run(out)
    reduced = reduce(run, _reduce_options(made, experiment), made.options.execution.executor)
    made.runs[experiment.name], made.metrics[experiment.name] = run, reduced.metrics


def _reduce_options(made: Made, experiment: Experiment) -> Options:
    references: tuple[tuple[str, str], ...] = ((made.base.data.healthy_class, made.radiography),)
    if experiment.cardiomegaly:
        references = ((CARDIOMEGALY, made.chexpert),) if made.chexpert else references
    options, ill = made.options, experiment.images == "abnormal"
    return Options(
        references=references,
        boxes=options.boxes if ill else None,
        weights=options.weights,
        resize=options.resize,
        cache=made.store.uri,
        brixia=options.brixia if ill else None,
    )
