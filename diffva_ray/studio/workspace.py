"""A folder in which images are asked about one at a time: each answer is a record of an ordinary run.

::

    images/<digest>/     an uploaded image, the painted region, and ``images.csv``, a data set of one image
    runs/<name>/         a run of one record, made by the code of ``diffva generate``
"""

from __future__ import annotations

import copy
import hashlib
import re
import shlex
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from diffva_ray.config.prompts import texts_of
from diffva_ray.config.recipe import Recipe
from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.data.captions import trained_texts
from diffva_ray.data.dataset import UnusableData
from diffva_ray.data.encoding import encode_mask
from diffva_ray.data.images import BadImage, decode_with_columns, to_square
from diffva_ray.evaluate.records import RecordImages, as_records, finished, read_images, read_records
from diffva_ray.explain.image import open_model
from diffva_ray.generate.attempts import Session
from diffva_ray.generate.cost import calls
from diffva_ray.generate.keys import check_device_name
from diffva_ray.generate.plan import Request, check_settings
from diffva_ray.generate.run import Run, open_run
from diffva_ray.generate.run_json import RUN
from diffva_ray.generate.shard import WorkerContext, run_shard
from diffva_ray.metrics.features import stand_in
from diffva_ray.model.card import ModelFolder
from diffva_ray.schema import Image, Mask, Record, digest
from diffva_ray.storage.opening import open_store
from diffva_ray.storage.store import absolute, join
from diffva_ray.workflows.execution import Execution, model_recipe
from diffva_ray.workflows.generate import plan_or_continue

LABEL = "uploaded"  # class of an uploaded image: nobody has said what it shows
DATA = "images.csv"
REGION = "generate.masked.source=lungs"  # method ``masked`` edits inside the mask beside the image
FIXED = ("generate.micro_batch=1", "generate.shard_size=1")  # one image at once, so no batch is padded
SAFE = re.compile(r"[^\w.-]+", re.ASCII)
MAX_NAME = 60


@dataclass(frozen=True)
class Question:
    """An image, and what its counterfactual should show."""

    name: str  # file name of the image, as uploaded; the seed is derived from it, as in ``diffva explain``
    data: bytes  # the file: PNG, JPEG, DICOM ...
    prompt: str  # empty: the recipe's healthy prompt
    settings: tuple[str, ...] = ()  # overrides of the recipe, as ``generate.strength=0.4`` or ``seed=3``
    region: Mask | None = None  # [H, W] of any size; only this may change (method ``masked``)


@dataclass(frozen=True)
class Reply:
    """The record of a question, and its images."""

    run: Run  # of this record alone
    record: Record
    images: RecordImages

    @property
    def command(self) -> str:
        """The command that makes the record again, in a folder of its own."""
        about, keys = self.run.about, self.run.keys
        parts = ["diffva", "generate", "--data", about["data"], "--model", about["model"], "--out", "runs/again"]
        options = {"--prompt": "prompt", "--method": "method", "--strength": "strength", "--seed": "seed",
                   "--guidance-scale": "guidance_scale", "--steps": "num_inference_steps",
                   "--scheduler": "scheduler"}  # fmt: skip
        parts += [text for option, key in options.items() for text in (option, str(keys[key]))]
        region = [REGION] if self.record["lung_mask_path"] else []
        parts += [text for override in (*FIXED, *region) for text in ("--set", override)]
        return shlex.join([*parts, "--executor", "inline"])


INLINE = Execution(executor="inline")


class Workspace:
    """Asks one model about images, and keeps every answer below the folder ``uri``.

    Raises UnusableModel for a model that cannot be used."""

    def __init__(self, uri: str, model: str, device: str | None = None) -> None:
        self.uri, self.model, self._lock = absolute(uri), absolute(model), threading.Lock()
        self.recipe = model_recipe(model, None, FIXED)
        self.engine, self.judge = open_model(model, self.recipe, (), device)
        self.extractor = stand_in()

    @property
    def prompts(self) -> list[str]:
        """The prompts that the model was trained with, the healthy one first."""
        data = self.recipe.data
        return list({text.casefold(): text for text in (data.healthy_prompt, *data.prompts.values())}.values())

    def notes(self, prompts: Sequence[str]) -> list[str]:
        """A line for each prompt that cannot be read, or not whole, or that has words unknown to the model."""
        try:
            texts = [text for prompt in prompts for text in texts_of(prompt)]
        except ValueError as error:  # a composed prompt without a part
            return [str(error)]
        unread = [prompt for prompt in prompts if not self.engine.fits(prompt)]
        notes = ModelFolder(self.model).prompt_notes(texts, trained_texts(self.recipe.data))
        return [*(f"prompt {prompt!r}: more tokens than the model reads" for prompt in unread), *notes]

    def preview(self, data: bytes) -> Image:
        """The image [size, size] in [0, 1] as the model sees it. Raises UnusableData."""
        try:
            pixels = decode_with_columns(data, None, self.recipe.generate.min_side, self.recipe.data.bits)[0]
        except BadImage as error:
            raise UnusableData(str(error)) from None
        return to_square(pixels, self.engine.size)

    def ask(self, question: Question, on_call: Callable[[int, int], None] | None = None) -> Reply:
        """Generate the counterfactual, or read it where the same was asked before.

        ``on_call(done, planned)`` is called after each pass of the denoising network. Raises UnusableData for an image
        or prompt that cannot be used, RecipeError or PlanError for settings, FingerprintDiffers for a record that
        another device or version has made."""
        self.preview(question.data)
        region = () if question.region is None else (REGION, "generate.method=masked", "generate.scheduler=ddim")
        recipe = model_recipe(self.model, None, (*FIXED, *question.settings, *region))
        check_settings(recipe.generate, {})
        data = self._store_image(question)
        request = Request(prompt=question.prompt or None)
        key = digest([data, request.prompt, recipe.seed, recipe.generate.model_dump(mode="json")])[:8]
        out = join(self.uri, "runs", f"{safe_name(question.name)}-{key}")
        with self._lock:
            run = plan_or_continue(recipe, data, ModelFolder(self.model), out, request, INLINE, self.engine.device.type)
            self._execute(run, recipe, on_call)
        return read_reply(run)

    def _store_image(self, question: Question) -> str:
        """Write the image and its region as a data set; returns the address of its table."""
        mask = b"" if question.region is None else encode_mask(question.region)
        name = safe_name(question.name)
        content = hashlib.sha256(question.data + mask + name.encode()).hexdigest()
        store = open_store(join(self.uri, "images", content[:12]))
        store.put_if_absent(name, question.data)
        if mask:
            store.put_if_absent("region.png", mask)
        store.put_if_absent(DATA, f"path,label,mask\n{name},{LABEL},{'region.png' if mask else ''}\n".encode())
        return join(store.uri, DATA)

    def _execute(self, run: Run, recipe: Recipe, on_call: Callable[[int, int], None] | None) -> None:
        """Commit the run's record, if it is pending, with the networks that are loaded already."""
        pending = run.pending()
        if not pending:
            return
        engine = copy.copy(self.engine)
        engine.config = recipe.generate
        if engine.device.type == "cpu":
            torch.set_num_threads(recipe.generate.cpu_threads)  # pages are answered in threads of their own
        check_device_name(run, engine.device_name)
        context = WorkerContext(run, run.data, engine, self.judge, self.extractor, Session())
        with counted_calls(engine, on_call):
            for shard in pending:
                run_shard(context, shard)

    def history(self) -> list[str]:
        """Names of the runs that have been asked for, in the order of their names."""
        paths = (path.split("/") for path, _ in open_store(self.uri).list("runs"))
        return sorted(parts[1] for parts in paths if parts[2:] == [RUN])

    def reply(self, name: str) -> Reply:
        """Read an earlier answer by its name in ``history``. Raises UnusableData."""
        if name not in self.history():
            raise UnusableData(f"{name}: no such result in {self.uri}")
        return read_reply(open_run(join(self.uri, "runs", name)))


def read_reply(run: Run) -> Reply:
    """The reply of a run with one record. Raises UnusableData with the reason of a record that is not ok."""
    records = read_records(run)
    if not len(records):
        raise UnusableData(f"{run.store.uri}: its record is not finished; ask again")
    if not len(finished(records)):
        row = records.iloc[0]
        raise UnusableData(f"{row['image_path']}: {row['error']}")
    (record,) = as_records(finished(records).head(1))
    return Reply(run, record, read_images(run, record))


def safe_name(name: str) -> str:
    """A file name from one that is not trusted: no folders, letters and digits only; unchanged where it is harmless."""
    cleaned = SAFE.sub("_", name.replace("\\", "/").rpartition("/")[2]).lstrip(".-")[-MAX_NAME:]
    return cleaned if cleaned and cleaned not in (DATA, "region.png") else f"image-{cleaned}"


@contextmanager
def counted_calls(engine: CounterfactualEngine, on_call: Callable[[int, int], None] | None) -> Iterator[None]:
    """Call ``on_call(done, planned)`` with the forward passes of the denoising network within the block."""
    planned, done = calls(engine.config.model_dump(), len(engine.bundle.recipe.data.prompts)).unet, 0

    def count(network: Any, inputs: tuple[Any, ...], output: Any) -> None:
        nonlocal done
        done += len(inputs[0])  # both branches of guidance are one batch
        if on_call is not None:
            on_call(min(done, planned), planned)

    handle = engine.bundle.unet.register_forward_hook(count)
    try:
        yield
    finally:
        handle.remove()
