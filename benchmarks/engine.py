"""Compare the engine with StableDiffusionImg2ImgPipeline: same model, scheduler, steps, guidance, dtype, images, cores.

    python benchmarks/engine.py --model runs/demo/model --out benchmarks/results/engine_cpu.json

Runs on a CPU; ``benchmarks/gpu.py`` compares the two on a GPU. The pipeline represents the loop a user would write: one
image per call, and its best batch; also in channels_last, compiled (``--compiled``), and as one process per core. The
engine also decodes the reconstruction, which the compensated map needs. So the pipeline appears twice: as it is, and
``with the reconstruction``, for which it encodes and decodes the images once more. Every contender is a process that
loads, warms up and waits for its turn. Turns are interleaved, and ratios are computed within a round. In float32 the
images must agree to 1e-4, or nothing is written.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import statistics
import time
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from img2img import GUIDANCE, PROMPT, img2img, run_img2img
from numpy.typing import NDArray
from torch.utils.flop_counter import FlopCounterMode

from diffva_ray.config.recipe import load_recipe
from diffva_ray.config.sampling import SamplingSettings
from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.data.phantoms import phantom
from diffva_ray.model.bundle import Bundle, build, load
from diffva_ray.model.schedulers import schedule
from diffva_ray.provenance import code_revision, version

AGREE = 1e-4  # of grey levels of 1, in float32
Images = NDArray[np.float32]


@dataclass(frozen=True)
class Contender:
    """One way to generate the images: implementation, batch size, number of processes and threads."""

    who: str  # ours, diffusers
    batch: int
    processes: int = 1
    threads: int = 1
    channels_last: bool = False
    compiled: bool = False
    reconstructs: bool = False

    @property
    def name(self) -> str:
        extras = [word for word in ("channels_last", "compiled") if getattr(self, word)]
        extras += ["with the reconstruction"] if self.reconstructs else []
        return ", ".join([f"{self.who}, batch {self.batch}", *extras, f"{self.processes} x {self.threads} threads"])


@dataclass(frozen=True)
class Task:
    """The work given to every contender."""

    model: str | None
    recipe: str | None
    dtype: str
    strength: float
    steps: int
    images: int


def images_of(task: Task, size: int) -> Images:
    """Return phantoms quantised to 8 bits, as a pipeline takes them: [images, size, size] in [0, 1]."""
    made = [phantom(("COVID", "Lung_Opacity")[n % 2], n, 1, size).image for n in range(task.images)]
    return np.stack([np.round(image * 255).astype(np.float32) / 255 for image in made])


def bundle_of(task: Task) -> Bundle:
    if task.model is not None:
        return load(task.model)
    assert task.recipe is not None
    return build(load_recipe(task.recipe))


def ours(task: Task, one: Contender) -> Any:
    """Return ``generate(images, seeds)`` of the engine, in micro-batches."""
    bundle = bundle_of(task)
    changes = {
        "micro_batch": one.batch, "dtype": task.dtype, "cpu_threads": one.threads,
        "posterior": "sample", "source_prompt": "", "negative_prompt": "",
    }  # fmt: skip
    engine = CounterfactualEngine(bundle, bundle.recipe.generate.model_copy(update=changes), "cpu")
    settings = SamplingSettings(
        method="sdedit",
        scheduler="pndm-diffusers",
        strength=task.strength,
        guidance_scale=GUIDANCE,
        num_inference_steps=task.steps,
    )

    def generate(images: Images, seeds: list[int]) -> Images:
        made = [
            engine(list(images[at : at + one.batch]), seeds[at : at + one.batch],
                   [PROMPT] * len(images[at : at + one.batch]), settings).counterfactuals
            for at in range(0, len(images), one.batch)
        ]  # fmt: skip
        return np.concatenate(made)

    return generate, engine


def diffusers(task: Task, one: Contender) -> Any:
    """Return ``generate(images, seeds)`` of StableDiffusionImg2ImgPipeline, with one generator per image."""
    torch.set_num_threads(one.threads)
    pipeline = img2img(bundle_of(task), "cpu", task.dtype, task.steps, task.strength)
    if one.channels_last:
        pipeline.unet.to(memory_format=torch.channels_last)
        pipeline.vae.to(memory_format=torch.channels_last)
    if one.compiled:
        pipeline.unet.compile()
        pipeline.vae.decoder.compile()

    def generate(images: Images, seeds: list[int]) -> Images:
        made = [
            run_img2img(pipeline, images[at : at + one.batch], seeds[at : at + one.batch], task.strength, task.steps,
                        one.reconstructs)
            for at in range(0, len(images), one.batch)
        ]  # fmt: skip
        return np.concatenate(made)

    return generate, None


def serve(pipe: Connection, task: Task, one: Contender, share: int) -> None:
    """Run a contender's process: generate its share of the images on request; reply with CPU seconds and images."""
    torch.set_num_threads(one.threads)
    generate, engine = (ours if one.who == "ours" else diffusers)(task, one)
    size = load_recipe(task.recipe).model.resolution if task.recipe else load(str(task.model)).recipe.model.resolution
    mine = slice(share, None, one.processes)
    images, seeds = images_of(task, size)[mine], list(range(task.images))[mine]
    began = time.perf_counter()
    generate(images[: one.batch], seeds[: one.batch])
    pipe.send(time.perf_counter() - began)
    while (word := pipe.recv()) != "end":
        if word == "stages":
            pipe.send(stages(engine, generate, images, seeds))
            continue
        before = time.process_time()
        made = generate(images, seeds)
        pipe.send((time.process_time() - before, made))


def stages(engine: CounterfactualEngine, generate: Any, images: Images, seeds: list[int]) -> dict[str, float]:
    """Return the share of time that the engine spends on encoding, denoising and decoding."""
    engine.watch.seconds = {}
    began = time.perf_counter()
    generate(images, seeds)
    whole = time.perf_counter() - began
    spent = {stage: seconds / whole for stage, seconds in engine.watch.seconds.items()}
    return {stage: round(share, 4) for stage, share in {**spent, "denoise": 1 - sum(spent.values())}.items()}


class Pool:
    """The processes of a contender, loaded and waiting."""

    def __init__(self, task: Task, one: Contender) -> None:
        self.one, self.task = one, task
        context = multiprocessing.get_context("spawn")
        self.pipes, self.processes = [], []
        for share in range(one.processes):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(there, task, one, share), daemon=True)
            process.start()
            there.close()
            self.pipes.append(here)
            self.processes.append(process)
        self.warm_up = max(pipe.recv() for pipe in self.pipes)

    def play(self) -> dict[str, Any]:
        """Generate all images once; return images per second, CPU seconds per image, and the images."""
        began = time.perf_counter()
        for pipe in self.pipes:
            pipe.send("go")
        answers = [pipe.recv() for pipe in self.pipes]
        wall = time.perf_counter() - began
        made = np.empty((self.task.images, *answers[0][1].shape[1:]), np.float32)
        for share, (_, pictures) in enumerate(answers):
            made[share :: self.one.processes] = pictures
        return {
            "rate": self.task.images / wall,
            "cpu": sum(cpu for cpu, _ in answers) / self.task.images,
            "made": made,
        }

    def stages(self) -> dict[str, float]:
        self.pipes[0].send("stages")
        return self.pipes[0].recv()

    def end(self) -> None:
        for pipe, process in zip(self.pipes, self.processes, strict=True):
            pipe.send("end")
            process.join()


def matmul_rate(dtype: str) -> float:
    """Return TFLOP/s of a large square matrix product on one core, the best of several.

    CPU seconds are used, which do not depend on other load.
    """
    torch.set_num_threads(1)
    side = 2048
    a = torch.randn(side, side, dtype=getattr(torch, dtype))
    best = float("inf")
    for _ in range(4):
        began = time.process_time()
        a @ a
        best = min(best, time.process_time() - began)
    return 2 * side**3 / best / 1e12


def tflop_per_image(task: Task) -> float:
    """Count the TFLOP of our engine per image: one encoding, guided steps, two decodings."""
    bundle = bundle_of(task)
    size, cells = bundle.recipe.model.resolution, bundle.recipe.model.resolution // bundle.latent_scale
    with torch.device("meta"):
        for module in bundle.modules.values():
            module.to("meta")
        latents, text = torch.empty(1, 4, cells, cells), torch.empty(1, 16, bundle.text_encoder.config.hidden_size)
        work = {
            "unet": lambda: bundle.unet(latents, torch.tensor(0), encoder_hidden_states=text),
            "encode": lambda: bundle.vae.encode(torch.empty(1, 3, size, size)),
            "decode": lambda: bundle.vae.decode(latents),
        }
        found = {}
        for name, call in work.items():
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                call()
            found[name] = counter.get_total_flops() / 1e12
    _, timesteps = schedule("pndm-diffusers", bundle.scheduler, task.steps, task.strength)
    return 2 * len(timesteps) * found["unet"] + found["encode"] + 2 * found["decode"]


def best_of(task: Task, candidates: list[Contender]) -> tuple[Contender, dict[str, float]]:
    """Return the fastest contender, by one turn each after a warm-up."""
    rates = {}
    for one in candidates:
        try:
            player = Pool(task, one)
            rates[one] = player.play()["rate"]
            player.end()
        except EOFError:  # the process is gone: no compiler
            click.echo(f"  {one.name}: failed")
            continue
        click.echo(f"  {one.name}: {rates[one]:.2f} images/s")
    return max(rates, key=lambda one: rates[one]), {one.name: round(rate, 3) for one, rate in rates.items()}


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "least": round(min(values), 3),
        "most": round(max(values), 3),
    }


def compare(task: Task, cores: int, batches: list[int], rounds: int, compiled: bool) -> dict[str, Any]:
    """Compare one edit: find the best of both sides by probes, then run interleaved rounds."""
    loop = Contender("diffusers", 1, 1, cores)
    click.echo(f"strength {task.strength:g} of {task.steps} steps, {cores} cores; probes:")
    batch, probes = best_of(task, [replace(loop, batch=size) for size in batches if size > 1])
    own, more = best_of(task, [Contender("ours", size, cores, 1) for size in batches])
    field = [own, loop, batch, replace(batch, channels_last=True)]
    field += [replace(one, reconstructs=True) for one in field[1:]]
    if cores > 1:
        field += [replace(batch, processes=cores, threads=1), replace(own, processes=1, threads=cores)]
    if compiled:
        field.append(replace(batch, compiled=True))
    players = [Pool(task, one) for one in field]
    turns: dict[Contender, list[dict[str, Any]]] = {one: [] for one in field}
    for number in range(rounds):
        for player in players[:: 1 if number % 2 else -1]:
            turns[player.one].append(player.play())
    shares = players[0].stages()
    warm = {player.one.name: round(player.warm_up, 1) for player in players}
    for player in players:
        player.end()

    apart = {one: float(np.abs(turns[own][0]["made"] - turns[one][0]["made"]).max()) for one in field[1:]}
    if task.dtype == "float32" and max(apart.values()) > AGREE:
        raise click.ClickException(f"the pictures differ by {max(apart.values()):.2g}: not the same work")
    rate = {one: [turn["rate"] for turn in turns[one]] for one in field}
    work, limit = tflop_per_image(task), matmul_rate(task.dtype)
    busy = statistics.median(turn["cpu"] for turn in turns[own])  # seconds an image
    return {
        "strength": task.strength,
        "steps": task.steps,
        "probes_images_per_second": probes | more,
        "images_per_second": {one.name: spread(rate[one]) for one in field},
        "cpu_seconds_a_image": {one.name: spread([turn["cpu"] for turn in turns[one]]) for one in field},
        "ours_over": {
            one.name: spread([a / b for a, b in zip(rate[own], rate[one], strict=True)]) for one in field[1:]
        },
        "ours_over_by_cpu_seconds": {
            one.name: spread([b["cpu"] / a["cpu"] for a, b in zip(turns[own], turns[one], strict=True)])
            for one in field[1:]
        },
        "largest_difference_of_pictures": {one.name: apart[one] for one in field[1:]},
        "warm_up_seconds": warm,
        "shares_of_time": shares,
        "tflop_a_image": round(work, 4),
        "matmul_tflops": round(limit, 4),
        "mfu": round(work / busy / limit, 3),
    }


@click.command()
@click.option("--model", default=None, help="A trained model folder.")
@click.option("--recipe", default=None, help="Instead of --model: a recipe; its model gets random weights.")
@click.option("--dtype", default="float32", type=click.Choice(["float32", "float16", "bfloat16"]))
@click.option("--edit", "edits", multiple=True, default=["0.55,20"], show_default=True, help="STRENGTH,STEPS; repeat.")
@click.option("--batches", default="1,2,4,8,16,32", show_default=True, help="Batch sizes that both sides try.")
@click.option("--images", default=32, show_default=True)
@click.option("--cores", default=os.cpu_count() or 1, show_default=True, help="Cores of each side.")
@click.option("--rounds", default=5, show_default=True)
@click.option("--compiled", is_flag=True, help="Also the pipeline under torch.compile (minutes on a CPU).")
@click.option("--out", type=click.Path(path_type=Path), default=None)
def main(
    model: str | None, recipe: str | None, dtype: str, edits: tuple[str, ...], batches: str, images: int,
    cores: int, rounds: int, compiled: bool, out: Path | None,
) -> None:  # fmt: skip
    if (model is None) == (recipe is None):
        raise click.UsageError("give --model, or --recipe for random weights")
    sizes = [int(size) for size in batches.split(",")]
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # of waiting threads, so that contenders do not disturb each other
    found = []
    for edit in edits:
        strength, _, steps = edit.partition(",")
        task = Task(model, recipe, dtype, float(strength), int(steps), images)
        found.append(compare(task, cores, sizes, rounds, compiled))
    words = ["--model MODEL" if model else f"--recipe {recipe}", f"--dtype {dtype}"]
    words += [*(f"--edit {edit}" for edit in edits), f"--batches {batches}", f"--images {images}", f"--cores {cores}"]
    words += [f"--rounds {rounds}", *(["--compiled"] if compiled else [])]
    result = {
        "command": " ".join(["python benchmarks/engine.py", *words]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "device": "cpu",
        "load_average": [round(value, 1) for value in os.getloadavg()],
        "versions": {name: version(name) for name in ("torch", "diffusers", "transformers")},
        "code": code_revision(),
        "edits": found,
    }
    click.echo(json.dumps(result, indent=1))
    if out is not None:
        out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
