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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

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
from diffva_ray.generate.shard import run_shard
from diffva_ray.generate.worker import WorkerContext
from diffva_ray.metrics.features import stand_in
from diffva_ray.metrics.validity import load_judge
from diffva_ray.model.card import ModelFolder
from diffva_ray.model.recipe import model_recipe
from diffva_ray.schema import Image, Mask, Record, digest
from diffva_ray.storage.opening import open_store
from diffva_ray.storage.store import absolute, join
from diffva_ray.studio.service import ServiceEngine
from diffva_ray.workflows.execution import Execution
from diffva_ray.workflows.generate import plan_or_continue

LABEL = "uploaded"  # class of an uploaded image: nobody has said what it shows
DATA = "images.csv"
REGION = "generate.masked.source=lungs"  # method ``masked`` edits inside the mask beside the image
ALONE = ("generate.micro_batch=1",)  # one image at once, so no batch is padded
ONE = "generate.shard_size=1"
REPEATED = ("micro_batch", "shard_size", "dtype")  # settings that a command repeats beside the sampling settings
OF_RUN = "record "  # begins the names of answers that are records of the run; names of folders have no space
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
        about, keys, record = self.run.about, self.run.keys, dict[str, Any](self.record)
        parts = ["diffva", "generate", "--data", about["data"], "--model", about["model"], "--out", "runs/again"]
        options = {"--prompt": "prompt", "--method": "method", "--strength": "strength", "--scheduler": "scheduler",
                   "--guidance-scale": "guidance_scale", "--steps": "num_inference_steps"}  # fmt: skip
        parts += [text for option, key in options.items() for text in (option, str(record[key]))]
        parts += ["--seed", str(keys["seed"]), *(["--classes", record["label"]] if about["records"] > 1 else [])]
        overrides = [f"generate.{name}={keys[name]}" for name in REPEATED]
        overrides += [REGION] if keys["masked"]["source"] == "lungs" else []
        return shlex.join([*parts, *(text for one in overrides for text in ("--set", one)), "--executor", "inline"])


INLINE = Execution(executor="inline")


class Workspace:
    """Asks one model about images, and keeps every answer below the folder ``uri``.

    ``service``: address of an HTTP service that runs the model's networks; ``run``: a run whose records are earlier
    answers, too. Raises UnusableModel for a model that cannot be used, UnusableData for a service that cannot."""

    def __init__(
        self, uri: str, model: str, device: str | None = None, service: str | None = None, run: Run | None = None
    ) -> None:
        self.uri, self.model, self.run, self._lock = absolute(uri), absolute(model), run, threading.Lock()
        self.extractor, self.folder = stand_in(), ModelFolder(self.model)
        self.engine: CounterfactualEngine | ServiceEngine
        if service is None:
            self.fixed: tuple[str, ...] = (*ALONE, ONE)
            self.recipe = model_recipe(model, None, self.fixed)
            self.engine, self.judge = open_model(model, self.recipe, (), device)
        else:
            self.recipe = model_recipe(model, None, ())
            self.engine, self.judge = ServiceEngine(service, self.model, self.recipe), load_judge(self.folder.store)
            self.fixed = (*self.engine.fixed, ONE)

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
        unread = self.folder.too_long(texts)[1]
        notes = self.folder.prompt_notes(texts, trained_texts(self.recipe.data))
        return [*(f"prompt {prompt!r}: more tokens than the model reads" for prompt in unread), *notes]

    def graded(self, prompt: str, severity: float) -> str:
        """The prompt at a severity from 0 to 1: mixed with the healthy one (``A TO B :0.3``, config/prompts.py), so
        that it is an ordinary prompt. The healthy prompt itself and composed ones stay as they are."""
        healthy = self.recipe.data.healthy_prompt
        if severity >= 1 or prompt.casefold() in ("", healthy.casefold()) or {"TO", "AND", "NOT"} & set(prompt.split()):
            return prompt
        return f"{healthy} TO {prompt} :{severity:g}"

    def preview(self, data: bytes) -> Image:
        """The image [size, size] in [0, 1] as the model sees it. Raises UnusableData."""
        try:
            pixels = decode_with_columns(data, None, self.recipe.generate.min_side, self.recipe.data.bits)[0]
        except BadImage as error:
            raise UnusableData(str(error)) from None
        return to_square(pixels, self.engine.size)

    def ask(self, question: Question, on_call: Callable[[int, int], None] | None = None) -> Reply:
        """Generate the counterfactual, or read it where the same was asked before.

        ``on_call(done, planned)`` is called after each pass of the denoising network on this machine. Raises
        UnusableData for an image, a prompt or a service that cannot be used, RecipeError or PlanError for settings,
        FingerprintDiffers for a record that another device or version has made."""
        self.preview(question.data)
        region = () if question.region is None else (REGION, "generate.method=masked", "generate.scheduler=ddim")
        recipe = model_recipe(self.model, None, (*self.fixed, *question.settings, *region, "generate.compile=false"))
        check_settings(recipe.generate, {})
        data = self._store_image(question)
        request = Request(prompt=question.prompt or None)
        key = digest([data, request.prompt, recipe.seed, recipe.generate.model_dump(mode="json")])[:8]
        out = join(self.uri, "runs", f"{safe_name(question.name)}-{key}")
        with self._lock:
            run = plan_or_continue(recipe, data, self.folder, out, request, INLINE, self.engine.device.type)
            self._execute(run, recipe, question, on_call)
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

    def _execute(
        self, run: Run, recipe: Recipe, question: Question, on_call: Callable[[int, int], None] | None
    ) -> None:
        """Commit the run's record, if it is pending, with the networks that are loaded already, or by the service."""
        pending = run.pending()
        if not pending:
            return
        engine: Any = copy.copy(self.engine)
        passes: AbstractContextManager[None] = nullcontext()
        if isinstance(self.engine, ServiceEngine):
            name, prompt = safe_name(question.name), str(run.keys["prompt"])
            engine = self.engine.ask(name, question.data, question.region, prompt, recipe)
        else:
            engine.config, passes = recipe.generate, counted_calls(engine, on_call)
        check_device_name(run, engine.device_name)
        context = WorkerContext(run, run.data, engine, self.judge, self.extractor, Session())
        with passes:
            for shard in pending:
                run_shard(context, shard)

    def history(self) -> list[tuple[str, str]]:
        """Description and name of each earlier answer, the newest first, then those of the run."""
        dated = list[tuple[str, str, str]]()
        for name in self._names():
            run = open_run(join(self.uri, "runs", name))
            dated.append((str(run.about["started"]), described(name.rpartition("-")[0], run.keys), name))
        answers = [(f"{about} ({when[:16].replace('T', ' ')})", name) for when, about, name in sorted(dated)[::-1]]
        records = [] if self.run is None else as_records(finished(read_records(self.run)))
        return answers + [(described(one["image_path"], one), OF_RUN + one["record_id"]) for one in records]

    def _names(self) -> set[str]:
        """Names of the runs that have a record."""
        return {path.split("/")[1] for path, _ in open_store(self.uri).list("runs") if "/records/" in path}

    def reply(self, name: str) -> Reply:
        """Read an earlier answer by its name in ``history``. Raises UnusableData."""
        if self.run is not None and name.startswith(OF_RUN):
            return read_reply(self.run, name.removeprefix(OF_RUN))
        if name not in self._names():
            raise UnusableData(f"{name}: no such result in {self.uri}")
        return read_reply(open_run(join(self.uri, "runs", name)))


def described(image: str, settings: Mapping[str, Any]) -> str:
    """An answer in a line: image, prompt, method, strength, guidance."""
    numbers = f"strength {settings['strength']:g}, guidance {settings['guidance_scale']:g}"
    return f"{image}, “{settings['prompt']}”: {settings['method']}, {numbers}"


def read_reply(run: Run, record_id: str | None = None) -> Reply:
    """The reply of a run's only record, or of the one named. Raises UnusableData with the reason of a record that is
    not ok."""
    records = read_records(run)
    records = records if record_id is None else records[records["record_id"] == record_id]
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
