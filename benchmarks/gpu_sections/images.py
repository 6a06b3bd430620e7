"""Section 4, whole images: from pixels to counterfactuals, the engine beside three uses of diffusers' pipeline.

Contenders stand ready together and take turns, so that a device that slows down slows all of them. Ours also makes the
reconstruction, without which there is no compensated map; so the pipeline runs as it is and with it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from img2img import img2img, run_img2img

from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.counterfactual.latent_diffusion import Generated
from gpu_sections.book import Book, Values
from gpu_sections.determinism import compile_pipeline, inductor_as_installed
from gpu_sections.measure import forget_peak, peak_gib, release, settle, switched
from gpu_sections.networks import Bench, captured
from gpu_sections.subject import Images, Subject, copied, generate, operations_of, setting

Make = Callable[[float, int], Images]  # strength, steps: counterfactuals of the contender's batch


@dataclass
class Contender:
    name: str
    batch: int
    make: Make
    switches: dict[str, bool] = field(default_factory=dict)
    reconstructs: bool = True
    failed: bool = False
    rates: dict[int, float] = field(default_factory=dict)  # images a second, by round
    peak: float | None = None
    made: Images | None = None


class GraphedUNet:
    """A UNet whose calls are CUDA graphs, one for each shape: what a call costs the host is two copies and a replay."""

    def __init__(self, unet: Any) -> None:
        self.unet, self.config = unet, unet.config
        self.graphs: dict[tuple[torch.Size, torch.Size], tuple[Any, ...]] = {}

    def parameters(self) -> Any:
        return self.unet.parameters()

    def __call__(self, latents: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor) -> Any:
        key = latents.shape, encoder_hidden_states.shape
        if key not in self.graphs:
            timesteps = torch.full((), int(timestep), dtype=torch.long, device=latents.device)
            mine = latents.clone(), timesteps, encoder_hidden_states.clone()
            whole = captured(lambda: self.unet(mine[0], mine[1], encoder_hidden_states=mine[2]).sample)
            self.graphs[key] = (*mine, whole)
        own_latents, own_timestep, own_states, replay = self.graphs[key]
        own_latents.copy_(latents)
        # a number is passed with the launch; only a timestep that is on the device is copied there
        own_timestep.copy_(timestep) if timestep.is_cuda else own_timestep.fill_(int(timestep))
        own_states.copy_(encoder_hidden_states)
        return SimpleNamespace(sample=replay().clone())


def section(book: Book, subject: Subject, bench: Bench | None) -> None:
    ready = Ready(book, subject, bench)
    ready.enter()
    credited = bench.credited if bench is not None else operations_of(subject)
    for strength, steps, rounds in subject.sizes.edits:
        play(book, ready.contenders, strength, steps, rounds, credited, subject)
    book.note(batches=list(subject.sizes.image_batches), dtype=subject.dtype)


class Ready:
    """Everybody who takes part; who cannot start is a row with the reason."""

    def __init__(self, book: Book, subject: Subject, bench: Bench | None) -> None:
        self.book, self.subject, self.bench = book, subject, bench
        self.contenders: list[Contender] = []
        self.strength, self.steps = subject.sizes.edits[0][0], max(int(2 / subject.sizes.edits[0][0]) + 1, 4)

    def enter(self) -> None:
        subject = self.subject
        eager: list[Any] = []
        self.channels_last = self.best_layout()
        self.book.note(pipeline_layout="channels_last" if self.channels_last else "NCHW")
        self.add("pipeline, eager, batch 1", 1, lambda: self.pipeline(eager, 1))
        batch = self.fastest("pipeline, eager", lambda size: self.pipeline(eager, size))
        self.add(f"pipeline, eager, best batch {batch}", batch, lambda: self.pipeline(eager, batch))
        self.add(f"pipeline, eager, best batch {batch}, with the reconstruction", batch,
                 lambda: self.pipeline(eager, batch, reconstructs=True))  # fmt: skip
        self.add("pipeline, eager, batch 1, with the reconstruction", 1,
                 lambda: self.pipeline(eager, 1, reconstructs=True))  # fmt: skip
        own = self.bench.ours if self.bench is not None else None
        own = own or subject.engine()
        batch = self.fastest("ours, as it is", lambda size: self.ours(own, size))
        default = subject.sizes.image_batches[0]
        for size in dict.fromkeys((batch, default)):
            self.add(f"ours, as it is, micro-batch {size}", size, lambda size=size: self.ours(own, size))
        self.add(f"ours, as it is, micro-batch {batch}, counterfactual alone", batch,
                 lambda: self.ours(own, batch, reconstructs=False))  # fmt: skip
        size = subject.sizes.compiled_images
        if subject.cuda:
            self.add(f"ours, CUDA graph, micro-batch {size}", size, lambda: self.ours(own, size, graph=True))
        whole = self.bench.compiled if self.bench is not None else None
        if whole is not None:
            self.add(f"ours, compiled, micro-batch {size}", size, lambda: self.ours(whole, size))
            if subject.cuda:
                self.add(f"ours, compiled, CUDA graph, micro-batch {size}", size,
                         lambda: self.ours(whole, size, graph=True))  # fmt: skip
        peer: list[Any] = []
        self.add(f"pipeline, compiled, batch {size}", size, lambda: self.pipeline(peer, size, compile_too=True))
        self.add(f"pipeline, compiled, batch {size}, with the reconstruction", size,
                 lambda: self.pipeline(peer, size, reconstructs=True, compile_too=True))  # fmt: skip

    def best_layout(self) -> bool:
        """Whether diffusers' UNet was faster in channels_last, as section 3 found: the peer is given what is best."""
        name = f"UNet, {2 * self.subject.sizes.unet_images[0]} samples, diffusers, eager, "
        plain, last = (self.book.value("networks", name + layout, "ms") for layout in ("NCHW", "channels_last"))
        return bool(plain and last and last < plain)

    def add(self, name: str, batch: int, make: Callable[[], Make]) -> None:
        """Start a contender and let it warm up on few steps."""

        def start() -> Values:
            began = time.perf_counter()
            one = Contender(name, batch, make(), self.bench.switches_of(name) if self.bench else {})
            one.reconstructs = "with the reconstruction" in name or ("ours" in name and "alone" not in name)
            with switched(**one.switches):
                one.make(self.strength, self.steps)
            settle(self.subject.device)
            self.contenders.append(one)
            return {"seconds_to_start": round(time.perf_counter() - began, 1)}

        # whoever has to be compiled first may take a part of the section, or nobody would have a turn
        self.book.row(f"start: {name}", start, most=0.4 if "compiled" in name else 1.0)

    def fastest(self, name: str, make: Callable[[int], Make]) -> int:
        """The batch with the best rate at few steps; a larger one has to be 3 % faster, since its turns are longer."""
        rates: dict[int, float] = {}
        for size in self.subject.sizes.image_batches:

            def probe(size: int = size) -> Values:
                with switched(**(self.bench.switches_of(name) if self.bench else {})):
                    one = make(size)
                    one(self.strength, self.steps)
                    settle(self.subject.device)
                    began = time.perf_counter()
                    one(self.strength, self.steps)
                    settle(self.subject.device)
                rates[size] = size / (time.perf_counter() - began)
                return {"images_per_second_at_few_steps": round(rates[size], 2)}

            self.book.row(f"probe: {name}, batch {size}", probe)
        best = self.subject.sizes.image_batches[0]
        for size, rate in rates.items():
            if best not in rates or rate > 1.03 * rates[best]:
                best = size
        return best

    def pipeline(self, kept: list[Any], batch: int, reconstructs: bool = False, compile_too: bool = False) -> Make:
        if not kept:
            pipeline = img2img(copied(self.subject.bundle), self.subject.device.type, self.subject.dtype,
                               self.steps, self.strength)  # fmt: skip
            if compile_too and not (self.subject.tiny and not self.subject.cuda):
                compile_pipeline(pipeline)
            elif self.channels_last:
                pipeline.unet.to(memory_format=torch.channels_last)
                pipeline.vae.to(memory_format=torch.channels_last)
            kept.append(pipeline)
        images, seeds = np.stack(self.subject.images(batch)), list(range(batch))

        def make(strength: float, steps: int) -> Images:
            with inductor_as_installed() if compile_too else nullcontext():
                return run_img2img(kept[0], images, seeds, strength, steps, reconstructs)

        return make

    def ours(self, engine: CounterfactualEngine, batch: int, reconstructs: bool = True, graph: bool = False) -> Make:
        images, model = self.subject.images(batch), engine.model
        unet: Any = GraphedUNet(engine.bundle.unet) if graph else engine.bundle.unet

        def make(strength: float, steps: int) -> Images:
            engine.config = engine.config.model_copy(update={"micro_batch": batch})
            model.unet = unet
            if not reconstructs:
                model.generated = lambda latents, request: Generated(made := model.decode(latents), made)
            try:
                return generate(engine, images, setting(strength=strength, num_inference_steps=steps))[0]
            finally:
                model.unet = engine.bundle.unet
                model.__dict__.pop("generated", None)

        return make


def play(
    book: Book, contenders: list[Contender], strength: float, steps: int, rounds: int,
    credited: dict[str, float], subject: Subject,
) -> None:  # fmt: skip
    """Rounds of one batch each; who fails once is out, who has no time left is named."""
    for one in contenders:
        one.rates, one.failed, one.made, one.peak = {}, False, None, None
    for number in range(rounds):
        for one in contenders[:: 1 if number % 2 == 0 else -1]:
            if one.failed:
                continue
            expected = one.batch / min(one.rates.values()) if one.rates else 0.0

            def turn(one: Contender = one, number: int = number) -> None:
                one.failed = True  # until it has come to its end
                with switched(**one.switches):
                    settle(subject.device)
                    forget_peak(subject.device)
                    began = time.perf_counter()
                    one.made = one.make(strength, steps)
                    settle(subject.device)
                    one.rates[number] = one.batch / (time.perf_counter() - began)
                one.peak, one.failed = peak_gib(subject.device), False

            book.row(f"{one.name}, {strength:g} x {steps}, round {number + 1}", turn, expected)
            one.failed = one.failed and not one.rates
    best = max((one for one in contenders if one.rates and one.name.startswith("ours") and one.reconstructs),
               key=lambda one: statistics.median(one.rates.values()), default=None)  # fmt: skip
    first = next((one.made for one in contenders if one.made is not None and one.name.startswith("pipeline")), None)
    for one in contenders:
        if not one.rates:
            continue
        rate, tflop = (
            statistics.median(one.rates.values()),
            tflop_of(strength, steps, one.reconstructs, credited, subject),
        )
        row: Values = {
            "name": f"{strength:g} x {steps}, {one.name}",
            "images_per_second": round(rate, 3),
            "least": round(min(one.rates.values()), 3),
            "most": round(max(one.rates.values()), 3),
            "rounds": len(one.rates),
            "tflop_per_second_credited": round(rate * tflop, 2),
            "with_reconstruction": one.reconstructs,
            "peak_gib_of_all_that_stand_ready": one.peak,
        }
        both = [] if best is None else sorted(best.rates.keys() & one.rates.keys())
        if best is not None and both:  # within a round, in which the device was in one state
            ratios = [best.rates[number] / one.rates[number] for number in both]
            row["best_of_ours_is_faster_by"] = round(statistics.median(ratios), 3)
            row["faster_by_least"], row["faster_by_most"] = round(min(ratios), 3), round(max(ratios), 3)
        if one.made is not None:
            row["not_finite"] = int((~np.isfinite(one.made)).any(axis=(1, 2)).sum())
            count = 0 if first is None else min(len(first), len(one.made))
            if first is not None and count:
                apart = np.abs(one.made[:count] - first[:count]) * 255
                row["grey_levels_from_the_pipeline_mean"] = float(np.nanmean(apart))
        book.keep(row)
    release()


def tflop_of(strength: float, steps: int, reconstructs: bool, credited: dict[str, float], subject: Subject) -> float:
    """Of one image, as the networks stand in the model: without what an implementation leaves out."""
    from diffva_ray.model.schedulers import schedule

    _, timesteps = schedule("pndm-diffusers", subject.bundle.scheduler, steps, strength)
    return 2 * len(timesteps) * credited["unet"] + credited["encode"] + (1 + reconstructs) * credited["decode"]
