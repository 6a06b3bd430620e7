"""Make the paper's tables, figures and page from images and a model, with ordinary runs below ``OUT/runs``.

The same command again continues, or does nothing if all is done. What cannot be made is listed with the reason.
"""

from __future__ import annotations

import json
from typing import Any

from diffva_ray._version import __version__
from diffva_ray.config.recipe import Recipe, RecipeError, fingerprint_difference
from diffva_ray.data.dataset import UnusableData
from diffva_ray.data.datasets import open_dataset
from diffva_ray.data.phantoms import make_phantoms, phantom
from diffva_ray.distributed import session
from diffva_ray.evaluate.annotations import lesion_shapes, read_sources
from diffva_ray.evaluate.options import Options
from diffva_ray.generate.failure_threshold import TooManyQuarantined
from diffva_ray.generate.plan import PromptTooLong
from diffva_ray.generate.run import FingerprintDiffers, open_run
from diffva_ray.model.card import UnusableModel, read_card
from diffva_ray.model.recipe import model_recipe
from diffva_ray.paper.experiments import EXPERIMENTS, SAMPLES, SETTINGS, Experiment, settings_recipe
from diffva_ray.paper.inputs import SEEDS, copy_images, drawn, limited, phantom_chexpert, read_image, sampled
from diffva_ray.paper.state import Inputs, PaperState
from diffva_ray.progress import LOG
from diffva_ray.schema import Image
from diffva_ray.storage.opening import open_store
from diffva_ray.storage.store import Store, join
from diffva_ray.workflows.generate import generate_run
from diffva_ray.workflows.reduce import reduce

OF_TABLES = ("weights", "resize", "boxes", "brixia", "carcinoma", "sources", "base")  # may change: the runs remain
GUARD, SUCCESS = "paper.json", "_SUCCESS"
QUICK_IMAGES = 24  # of each class, with --quick
FIGURE_IMAGES = 3  # healthy images of the figures with several prompts
CARDIOMEGALY = "Cardiomegaly"
HEALTHY_SAMPLE = "random healthy"  # name in the sheet


def run_paper(options: Inputs) -> str:
    """Make everything that is missing, and return the URI of the page.

    Raises UnusableData for a data set that cannot be read or has no healthy or no abnormal images, UnusableModel,
    RecipeError for options that change the model, and FingerprintDiffers for a folder with the paper of another model
    or of other images."""
    from diffva_ray.paper.page import write_page

    store, base, card = _open(options)
    _guard(store, options, card)
    success = {**{key: getattr(options, key) for key in OF_TABLES}, "version": __version__}
    page = join(store.uri, "index.html")
    if store.exists(SUCCESS) and json.loads(store.read(SUCCESS)) == success:
        LOG.info("%s: complete; nothing to do", store.uri)
        return page
    store.delete(SUCCESS)
    state = _images(store, base, card, options)
    if options.execution.executor == "inline":
        _runs(state)
    else:
        with session.connect():
            _runs(state)
    write_page(state)
    store.put(SUCCESS, json.dumps(success).encode())
    return page


def planned_paper(options: Inputs) -> dict[str, Any]:
    """The runs that ``run_paper`` would make, for ``--dry-run``; nothing is written."""
    _, base, card = _open(options)
    runs = []
    for experiment in EXPERIMENTS:
        if (model := _model(options, experiment)) is None:
            continue
        recipe = _recipe(options, base, experiment, model)
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
        raise UnusableData("--radiography: give the COVID-19 Radiography Database, or --quick to use phantoms")
    for uri in (options.radiography, options.chexpert):
        if uri is not None:
            open_dataset(uri)  # check before writing, so that a wrong path leaves no folder behind
    if options.carcinoma is not None:
        read_image(options.carcinoma)
    if options.sources is not None:
        read_sources(options.sources, [])
    card = read_card(open_store(options.model))
    if card is None:
        raise UnusableModel(f"--model {options.model}: no diffva.json there; train a model first")
    if options.base is not None and read_card(open_store(options.base)) is None:
        raise UnusableModel(f"--base {options.base}: no diffva.json there; train it with 0 steps in every stage")
    base = model_recipe(options.model, options.recipe, options.overrides)
    if base.model != model_recipe(options.model, options.recipe, ()).model:
        raise RecipeError("--set model.…: diffva paper does not change the model; train another one instead")
    return open_store(options.out), base, card


def _per_class(options: Inputs) -> int | None:
    if options.limit is not None:
        return options.limit
    return QUICK_IMAGES if options.quick else None


def _guard(store: Store, options: Inputs, card: dict[str, Any]) -> None:
    """Refuse a folder with other inputs than OF_TABLES."""
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


def _images(store: Store, base: Recipe, card: dict[str, Any], options: Inputs) -> PaperState:
    """Bring the input images into place; missing inputs are listed in ``missing``."""
    per_class, size, healthy = _per_class(options), base.model.resolution, base.data.healthy_class
    folder = join(store.uri, "data")
    if options.radiography is None:
        radiography = join(folder, "radiography")
        make_phantoms(radiography, 4 * (per_class or QUICK_IMAGES), size, SEEDS["radiography"])
    else:
        radiography = limited(options.radiography, base.data, per_class, join(folder, "radiography"), base.seed)
    state = PaperState(store, base, card, radiography, options)
    dataset = open_dataset(radiography, base.data)
    state.notes += [f"images: {note}" for note in dataset.notes]
    state.lesions = lesion_shapes(radiography, state.base.data, options.boxes, state.notes)
    if healthy not in dataset.classes:
        raise UnusableData(f"--radiography {options.radiography}: no image of the healthy class {healthy}")
    if len(dataset.classes) == 1:
        raise UnusableData(f"--radiography {options.radiography}: no image of an abnormal class")
    _draw_cardiomegaly(state, join(folder, "chexpert"), per_class, size)
    state.carcinoma = _carcinoma(state, size)
    # random healthy images of table 5, and a few of them for the figures with several prompts
    state.samples[HEALTHY_SAMPLE] = drawn(
        radiography, base.data, healthy, SAMPLES[HEALTHY_SAMPLE], join(folder, "healthy"), base.seed
    )
    few = sampled([image for image in dataset.images if image.label == healthy], FIGURE_IMAGES, base.seed)
    copy_images(dataset, few, join(folder, "few"))
    return state


def _carcinoma(state: PaperState, size: int) -> Image | None:
    """The real case beside figure 4; with phantoms a phantom with a mass."""
    options = state.options
    if options.carcinoma is not None:
        return read_image(options.carcinoma, state.base.data.bits)
    if options.radiography is None:
        return phantom("Mass", patient=0, seed=SEEDS["chexpert"], size=size).image
    state.missing.append(("figure 4, the real carcinoma", "no image given (--carcinoma)"))
    return None


def _draw_cardiomegaly(state: PaperState, folder: str, per_class: int | None, size: int) -> None:
    """Draw the real cardiomegaly of table 4 from CheXpert, or from phantoms in its layout."""
    options, uri = state.options, state.options.chexpert
    if uri is None and options.quick and options.radiography is None:
        uri = phantom_chexpert(folder, per_class or QUICK_IMAGES, size)
    what = "table 4, real cardiomegaly against generated"
    if uri is None:
        state.missing.append((what, "no CheXpert given (--chexpert)"))
        return
    wanted = min(SAMPLES["cardiomegaly"], per_class or SAMPLES["cardiomegaly"])
    try:
        sample = drawn(uri, state.base.data, CARDIOMEGALY, wanted, join(folder, "sample"), state.base.seed)
        state.samples["cardiomegaly"] = sample
        state.notes += [f"CheXpert: {note}" for note in open_dataset(uri, state.base.data).notes]
    except UnusableData as error:
        state.missing.append((what, str(error)))


def _runs(state: PaperState) -> None:
    """Generate and reduce all experiments; finished runs are not repeated."""
    for number, experiment in enumerate(EXPERIMENTS, 1):
        LOG.info("run %d of %d: %s (%s)", number, len(EXPERIMENTS), experiment.name, experiment.shows)
        if (model := _model(state.options, experiment)) is None:
            state.missing.append((experiment.shows, "no model before fine-tuning given (--base)"))
            continue
        try:
            _run(state, experiment, model)
        except (TooManyQuarantined, PromptTooLong) as error:
            if experiment.images == "abnormal":
                raise
            state.missing.append((experiment.shows, str(error)))  # e.g. a prompt that is too long for this model


def _run(state: PaperState, experiment: Experiment, model: str) -> None:
    """Generate and reduce one experiment."""
    recipe = _recipe(state.options, state.base, experiment, model)
    data = {
        "few healthy": join(state.store.uri, "data", "few"),
        "random healthy": state.samples[HEALTHY_SAMPLE].uri,
    }.get(experiment.images, state.radiography)
    out = join(state.store.uri, "runs", experiment.name)
    request = experiment.request(state.base.data)
    generate_run(recipe, data, model, out, request, state.options.execution)
    run = open_run(out)
    reduced = reduce(run, _reduce_options(state, experiment), state.options.execution.executor)
    state.runs[experiment.name], state.metrics[experiment.name] = run, reduced.metrics


def _model(options: Inputs, experiment: Experiment) -> str | None:
    """The model that makes an experiment; None for the base model without ``--base``."""
    return options.base if experiment.of_base else options.model


def _recipe(options: Inputs, base: Recipe, experiment: Experiment, model: str) -> Recipe:
    """The recipe of an experiment for the model that makes it."""
    if experiment.of_base:
        base = model_recipe(model, options.recipe, options.overrides)
    return settings_recipe(base, experiment, options.overrides)


def _reduce_options(state: PaperState, experiment: Experiment) -> Options:
    references: tuple[tuple[str, str], ...] = ((state.base.data.healthy_class, state.radiography),)
    if experiment.cardiomegaly and "cardiomegaly" in state.samples:
        references = ((CARDIOMEGALY, state.samples["cardiomegaly"].uri),)
    options, is_abnormal = state.options, experiment.images == "abnormal"
    return Options(
        references=references,
        boxes=options.boxes if is_abnormal else None,
        weights=options.weights,
        resize=options.resize,
        cache=state.store.uri,
        brixia=options.brixia if is_abnormal else None,
        sources=options.sources if experiment.name in SETTINGS else None,
    )
