"""Determinism: sha256 of the same images from child processes.

A child is ``gpu.py --child JOB`` with a time limit, so that a hanging compiler or a process that takes all memory ends
without affecting the parent. Compilations run in parallel with untimed work of the parent; they also fill inductor's
cache, from which the parent's own compilations start.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from img2img import img2img, run_img2img

from gpu_sections.book import Book, Values
from gpu_sections.measure import switched, switches
from gpu_sections.subject import Sizes, Subject, allow_compilations, compiled, generate, guidance_of, setting

ENTRY = Path(__file__).parents[1] / "gpu.py"
FILLED = 0.85  # of the device's memory, for the child under pressure


class Child:
    """A process that does one job and writes its result to a file."""

    def __init__(self, name: str, scratch: Path, job: Values, limit: float) -> None:
        self.name, self.ends = name, time.monotonic() + limit
        self.answer = scratch / f"{name.replace(' ', '-').replace(',', '')}.json"
        self.said = self.answer.with_suffix(".log")
        words = [sys.executable, str(ENTRY), "--child", json.dumps({**job, "answer": str(self.answer), "limit": limit})]
        with self.said.open("wb") as out:
            self.process = subprocess.Popen(words, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)

    def result(self, most: float) -> Values:
        """What it found. Raises RuntimeError, the reason, where it found nothing in time."""
        try:
            self.process.wait(max(min(self.ends - time.monotonic(), most), 0.1))
        except subprocess.TimeoutExpired:
            self.end()
            raise RuntimeError("its time was over") from None
        if not self.answer.exists():
            last = self.said.read_text(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
            raise RuntimeError(f"exit code {self.process.returncode}: {last[0]}")
        return json.loads(self.answer.read_text())

    def end(self) -> None:
        """End the process and the compilers it has started, which are of its own session."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


class Children:
    """All child processes; none outlives the block."""

    def __init__(self, book: Book, subject: Subject) -> None:
        self.book, self.subject, self.all = book, subject, list[Child]()
        self.cold: Child | None = None
        self.pressed: Child | None = None
        self.others: list[Child] = []
        self.digests: list[list[str] | None] = []
        self.networks = subject.scratch / "networks.pt"

    def __enter__(self) -> Children:
        self.book.at_end.append(self.end)
        self.book.row("networks for other processes", self._save)
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        for child in self.all:
            child.end()

    def _save(self) -> Values:
        """The networks in the dtype they run in, and the images: a child has them in seconds."""
        bundle = self.subject.copied()
        for module in bundle.modules.values():
            module.to(getattr(torch, self.subject.dtype)).cpu()
        torch.save({"bundle": bundle, "phantoms": self.subject.phantoms}, self.networks)
        return {"gigabytes": round(self.networks.stat().st_size / 1e9, 2)}

    def start(self, name: str, limit: float = 200.0, **job: Any) -> Child:
        shared = {
            "networks": str(self.networks), "device": self.subject.device.type, "dtype": self.subject.dtype,
            "tiny": self.subject.tiny, "steps": self.subject.sizes.determinism_steps,
        }  # fmt: skip
        self.all.append(Child(name, self.subject.scratch, {**shared, **job}, limit))
        return self.all[-1]

    def start_compiling(self) -> None:
        batch = self.subject.sizes.compiled_images
        self.cold = self.start("compiled, cold cache", kind="pixels", micro_batch=batch, compiled=True, times=2)
        if self.subject.cuda:
            self.others = [
                self.start("compiled with the timestep on the device", kind="guided", micro_batch=batch),
                self.start("pipeline compiled, cold cache", kind="peer", micro_batch=batch),
            ]

    @property
    def eager(self) -> Values:
        return {"kind": "pixels", "micro_batch": 2 if self.subject.tiny else 8, "compiled": False}

    def start_under_pressure(self) -> None:
        """Before any other process needs memory. Kernels that do not find their workspace fall back to others."""
        name = f"eager, {FILLED:.0%} of the memory taken"
        if self.subject.cuda:
            self.pressed = self.start(name, **self.eager, times=1, fill=FILLED)
        else:
            self.book.leave_out(name, "no GPU memory to take")

    def finish_under_pressure(self) -> None:
        if self.pressed is not None:
            self.digests.append(self._row(self.pressed))

    def same_pixels(self) -> None:
        """Eager: three times in a process, in another one, and in the one with most of the memory taken."""
        beside = [
            self.start("eager, three times", **self.eager, times=3),
            self.start("eager, another process", **self.eager, times=1),
        ]
        self._same("eager", self.digests + [self._row(child) for child in beside])

    def finish_compiling(self) -> None:
        assert self.cold is not None
        digests = [self._row(self.cold)]
        warm = {"kind": "pixels", "micro_batch": self.subject.sizes.compiled_images, "compiled": True, "times": 1}
        if digests[0] is not None:
            digests.append(self._row(self.start("compiled, warm cache", **warm)))
        self._same("compiled", digests)
        for other in self.others:
            self._row(other)

    def _row(self, child: Child) -> list[str] | None:
        found = self.book.row(child.name, lambda: child.result(self.book.left() - 1))
        return None if found is None else found.get("sha256")

    def _same(self, name: str, digests: list[list[str] | None]) -> None:
        known = [digest for some in digests if some for digest in some]
        if len(known) < 2:
            self.book.leave_out(f"same pixels, {name}", "fewer than two results")
            return
        distinct = len(set(known))
        self.book.check(f"same pixels, {name}: distinct results of {len(known)}", distinct == 1, distinct, 1)


def child(job: Values) -> None:
    """Do one job in the child process, and write the result to the file ``answer``."""
    signal.alarm(math.ceil(job["limit"]))  # and no longer, even where nobody waits any more
    found = {"pixels": pixels, "guided": guided, "peer": peer}[job["kind"]](job)
    Path(job["answer"]).write_text(json.dumps(found))


def subject_of(job: Values) -> Subject:
    made = torch.load(job["networks"], weights_only=False, map_location="cpu")  # written by our own parent
    sizes = replace(Sizes(), determinism_steps=job["steps"])
    return Subject(torch.device(job["device"]), job["dtype"], job["tiny"], sizes, made["bundle"], Path(), None,
                   made["phantoms"])  # fmt: skip


def pixels(job: Values) -> Values:
    """sha256 of the counterfactuals and reconstructions of the same images, ``times`` times."""
    taken = fill(job["fill"]) if job.get("fill") else None
    subject, began = subject_of(job), time.perf_counter()
    with switched():
        engine = subject.engine(bundle=subject.bundle, micro_batch=job["micro_batch"])
        backend = compiled(engine, subject.tiny) if job["compiled"] else None
        settings, digests, first = setting(num_inference_steps=job["steps"]), list[str](), 0.0
        for _ in range(job["times"]):
            made = generate(engine, subject.images(len(subject.phantoms)), settings)
            digests.append(hashlib.sha256(b"".join(np.ascontiguousarray(part).tobytes() for part in made)).hexdigest())
            first = first or time.perf_counter() - began
        state = switches()
    return {
        "sha256": digests,
        "first": digests[0][:12],
        "images": len(subject.phantoms),
        "micro_batch": job["micro_batch"],
        "seconds_until_first": round(first, 1),
        "compiled_by": backend,
        "taken_gib": None if taken is None else round(taken.numel() / 2**30, 1),
        "finite": bool(all(np.isfinite(part).all() for part in made)),
        "switches": state,
    }


def fill(share: float) -> torch.Tensor:
    """Allocate memory until only 1 - ``share`` of the device is free."""
    free, total = torch.cuda.mem_get_info()
    return torch.empty(max(int(free - (1 - share) * total), 0), dtype=torch.uint8, device="cuda")


def guided(job: Values) -> Values:
    """Compile the UNet as section 3 calls it, for the same reason as ``peer``."""
    subject, began = subject_of(job), time.perf_counter()
    count, side = job["micro_batch"], subject.latent_side
    with switched(), torch.inference_mode():
        engine = subject.engine(bundle=subject.bundle, micro_batch=count)
        compiled(engine, subject.tiny)
        latents = subject.random(count, 4, side, side, dtype="float32")
        request = guidance_of(subject, subject.dtype, count)
        engine.model.guided(latents, torch.tensor(401, device=subject.device), request)
    return {"seconds_until_first": round(time.perf_counter() - began, 1), "micro_batch": count}


def peer(job: Values) -> Values:
    """Compile the pipeline as section 4 does, to have it in inductor's cache."""
    subject, began = subject_of(job), time.perf_counter()
    with switched(), inductor_as_installed():
        pipeline = img2img(subject.bundle, job["device"], job["dtype"], job["steps"], 0.55)
        compile_pipeline(pipeline)
        images = np.stack(subject.images(job["micro_batch"]))
        run_img2img(pipeline, images, list(range(len(images))), 0.55, job["steps"], reconstructs=True)
    return {"seconds_until_first": round(time.perf_counter() - began, 1), "micro_batch": job["micro_batch"]}


@contextmanager
def inductor_as_installed() -> Iterator[None]:
    """For the peer: the engine switches inductor to deterministic choices for the whole process."""
    from torch._inductor import config

    if not hasattr(config, "deterministic"):
        yield
        return
    with config.patch(deterministic=False):
        yield


def compile_pipeline(pipeline: Any) -> None:
    """As a user who has read diffusers' guide would do it, with shapes that are fixed."""
    allow_compilations()
    pipeline.unet.to(memory_format=torch.channels_last)
    pipeline.vae.to(memory_format=torch.channels_last)
    pipeline.unet.compile(dynamic=False)
    pipeline.vae.encoder.compile(dynamic=False)
    pipeline.vae.decoder.compile(dynamic=False)
