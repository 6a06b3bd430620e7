"""Section 2, correctness: whether a device keeps the product's guarantees about numbers.

Compares with the CPU in float32, between dtypes, between batches, and counts waits of the methods; ``determinism.py``
compares processes, memory pressure and compilations.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from img2img import img2img, run_img2img

from diffva_ray.config.methods import METHODS
from diffva_ray.config.sampling import SamplingSettings
from diffva_ray.counterfactual.attribution import attribution
from diffva_ray.counterfactual.engine import CounterfactualEngine
from diffva_ray.data.phantoms import Phantom, phantom
from diffva_ray.metrics.localization import positive, score
from diffva_ray.model.bundle import Bundle, load
from diffva_ray.model.classifier import LatentClassifier
from gpu_sections.book import Book, Values
from gpu_sections.determinism import Children
from gpu_sections.measure import relative_error, release, switch, switched, switches, tf32
from gpu_sections.subject import Subject, copied, generate, setting, small_bundle

AGREE = 1e-4  # relative, of one call in float32 on two devices
HALF_A_LEVEL = 0.5  # of 255 grey levels, of whole images in float32: what 8 bits cannot show
LADDER = ("float32", "float32 with TF32", "bfloat16", "float16", "bfloat16, autoencoder float32")
SAMPLERS = ("pndm-diffusers", "pndm", "ddim", "dpmsolver++", "unipc", "euler", "vp-sde", "ve-sde")


def section(book: Book, subject: Subject) -> None:
    """The children that compile work on beside everything that is not timed, and nothing here is."""
    with Children(book, subject) as children:
        children.start_under_pressure()
        truth: list[Reference] = []  # which needs the CPU alone, while the child has the device's memory
        book.row("reference on the CPU, float32", lambda: truth.append(Reference(subject)) or {}, checked=True)
        children.finish_under_pressure()
        children.start_compiling()
        if truth:
            parity(book, subject, truth[0])
        batch_invariance(book, subject)
        book.row("images against diffusers' pipeline, float32", lambda: against_diffusers(book, subject), checked=True)
        ladder(book, subject)
        with switched():
            synchronisations(book, subject)
        children.same_pixels()
        children.finish_compiling()


@contextmanager
def all_cores() -> Iterator[None]:
    """Use all cores for the reference, because the engine sets PyTorch to one thread on a CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# (a) and (e): the networks against the CPU, plain and as the engine runs them


class Reference:
    """One input to every network, and what the plain networks make of it on the CPU in float32."""

    def __init__(self, subject: Subject) -> None:
        side, bundle = subject.latent_side, subject.bundle
        generator = torch.Generator().manual_seed(5)
        latents = torch.randn(1, 4, side, side, generator=generator)
        self.latents = torch.cat([latents, latents])  # both branches of guidance
        self.text = torch.randn(2, *subject.text_shape, generator=generator)
        self.timestep = torch.tensor(401)
        self.image = torch.from_numpy(subject.images(1)[0])[None]
        with torch.inference_mode(), all_cores():
            self.unet = bundle.unet(self.latents, self.timestep, encoder_hidden_states=self.text).sample
            pixels = (self.image[:, None] * 2 - 1).expand(-1, 3, -1, -1).contiguous()
            self.encode = bundle.vae.encode(pixels).latent_dist.mean
            self.decode = bundle.vae.decode(self.latents[:1] / bundle.vae.config.scaling_factor).sample


def parity(book: Book, subject: Subject, truth: Reference) -> None:
    kinds: tuple[tuple[str, str, dict[str, bool] | None], ...] = (
        ("float32", "float32", tf32(False)),
        ("float32, switches as the engine leaves them", "float32", None),
        ("float32 with TF32", "float32", tf32(True)),
        ("bfloat16", "bfloat16", None),
        ("float16", "float16", None),
    )
    for name, dtype, flags in kinds:
        found = book.row(
            f"networks against the CPU, {name}",
            lambda dtype=dtype, flags=flags: networks_against(subject, truth, dtype, flags),
            checked=name == "float32",
        )
        if found is None:
            continue
        if name == "float32":
            for key in ("unet", "encode", "decode"):
                for whose in ("plain", "ours"):
                    error = found[f"{key}_{whose}_relative_error"]
                    book.check(f"{key}, {whose}, float32 without TF32, against the CPU", error < AGREE, error, AGREE)
        for key in ("unet", "decode"):  # FourPhases, and the shared start: not worse than rounding in that dtype
            ours, plain = found[f"{key}_ours_relative_error"], found[f"{key}_plain_relative_error"]
            limit = 2 * plain + 1e-5
            book.check(f"{key}, ours not worse than twice plain, {name}", ours <= limit, ours, round(limit, 6))


@torch.inference_mode()
def networks_against(subject: Subject, truth: Reference, dtype: str, flags: dict[str, bool] | None) -> Values:
    """Relative errors of one call of each network. ``plain``: as diffusers has it, in PyTorch's own layout; ``ours``:
    by the engine, in channels_last with its upsamplers; the UNet also with the start that the branches share."""
    kind, device = getattr(torch, dtype), subject.device
    latents, text, image = (part.to(device) for part in (truth.latents, truth.text, truth.image))
    errors: dict[str, float] = {}
    with switched(**(flags or {})):
        unet = copy.deepcopy(subject.resident.unet).to(device, kind)
        made = unet(latents.to(kind), truth.timestep.to(device), encoder_hidden_states=text.to(kind)).sample
        errors["unet_plain"] = relative_error(made, truth.unet)
        del unet
        vae = copy.deepcopy(subject.resident.vae).to(device, kind)
        pixels = (image[:, None] * 2 - 1).expand(-1, 3, -1, -1).contiguous().to(kind)
        errors["encode_plain"] = relative_error(vae.encode(pixels).latent_dist.mean, truth.encode)
        decoded = vae.decode((latents[:1] / vae.config.scaling_factor).to(kind)).sample
        errors["decode_plain"] = relative_error(decoded, truth.decode)
        del vae
        release()
        engine = subject.engine(dtype)
        if flags is not None:  # an engine may set them to what it needs
            switch(**flags)
        state, model = switches(), engine.model
        errors["unet_without_shared_start"] = relative_error(model.predict(latents, truth.timestep, text), truth.unet)
        with model.shared_start:
            errors["unet_ours"] = relative_error(model.predict(latents, truth.timestep, text), truth.unet)
        errors["encode_ours"] = relative_error(model.encode(image)[0], truth.encode)
        grey = (truth.decode / 2 + 0.5).clamp(0, 1).mean(dim=1)
        errors["decode_grey_ours"] = relative_error(model.decode(latents[:1]), grey)
        decoded = model.vae.decode((latents[:1] / model.scale).to(kind)).sample
        errors["decode_ours"] = relative_error(decoded, truth.decode)
    return {**{f"{name}_relative_error": value for name, value in errors.items()}, "switches": state}


# (a), whole images: the engine and diffusers' pipeline do the same work


def against_diffusers(book: Book, subject: Subject) -> Values:
    bundle, size = small_bundle(subject.tiny), subject.sizes.small_images
    images = small_images(bundle, size)
    with switched(**tf32(False)):
        engine = subject.engine("float32", copied(bundle), micro_batch=size)
        switch(**tf32(False))
        settings = setting(num_inference_steps=subject.sizes.small_steps)
        ours, rebuilt = generate(engine, images, settings)
        del engine
        pipeline = img2img(bundle, subject.device.type, "float32", settings.num_inference_steps, settings.strength)
        theirs = run_img2img(pipeline, np.stack(images), list(range(size)), settings.strength,
                             settings.num_inference_steps)  # fmt: skip
    apart = float(np.abs(ours - theirs).max()) * 255
    name = "images against diffusers' pipeline, float32, grey levels apart"
    book.check(name, apart < HALF_A_LEVEL, apart, HALF_A_LEVEL)
    return {"grey_levels_apart_most": apart, "mean_change": float(np.abs(ours - rebuilt).mean())}


def small_images(bundle: Bundle, count: int) -> list[np.ndarray]:
    made = [phantom(("COVID", "Lung_Opacity")[n % 2], n, 1, bundle.recipe.model.resolution).image for n in range(count)]
    return [np.round(image * 255).astype(np.float32) / 255 for image in made]


# (b) what a dtype does to images, maps and AUROC


def ladder(book: Book, subject: Subject) -> None:
    """With a trained model (``--model``) the whole of it; random weights find no lesions, so AUROC is left out then."""
    trained = subject.model is not None
    if not trained:
        book.leave_out("AUROC over dtypes", "no trained model was given (--model), and random weights find no lesions")
    bundle = load(str(subject.model)) if trained else small_bundle(subject.tiny)
    side, steps = bundle.recipe.model.resolution, subject.sizes.small_steps
    cases = [phantom(("COVID", "Lung_Opacity", "Viral Pneumonia")[n % 3], n, 9001, side)
             for n in range(subject.sizes.small_images)]  # fmt: skip
    asked = {
        "sdedit": (setting(num_inference_steps=steps), {"difference": "compensated"}),
        "ddim-inversion": (
            setting("ddim-inversion", "ddim", strength=0.7, num_inference_steps=steps, guidance_scale=2.5),
            {"difference": "compensated", "source_prompt": "<guess>", "negative_prompt": "<source>"},
        ),
    }
    for method, (settings, changes) in asked.items():
        steps_of = Ladder(subject, bundle, cases, settings, changes)
        with all_cores():
            kind = "trained" if trained else "random"
            book.row(f"{method}, float32 on the CPU, {kind} small model", lambda to=steps_of: to("float32", "cpu"),
                     checked=True)  # fmt: skip
        for name in LADDER:
            found = book.row(f"{method}, {name}", lambda to=steps_of, name=name: to(name, subject.device.type))
            if found is None:
                continue
            if name == "float32":
                most = found["grey_levels_apart_most"]
                label = f"{method}, float32 against the CPU, grey levels apart"
                book.check(label, most is not None and most < HALF_A_LEVEL, most, HALF_A_LEVEL)
            bad = found["not_finite"]
            book.check(f"{method}, {name}, images that are not finite", not bad, bad, 0)


class Ladder:
    """One method in one dtype after another; the first call, on the CPU, is what the others are held against."""

    def __init__(
        self, subject: Subject, bundle: Bundle, cases: list[Phantom], settings: SamplingSettings, changes: Values
    ) -> None:
        self.subject, self.bundle, self.cases, self.settings = subject, bundle, cases, settings
        self.changes = {**changes, "posterior": "mode", "micro_batch": len(cases)}
        self.truth: tuple[np.ndarray, np.ndarray] | None = None

    def __call__(self, name: str, device: str) -> Values:
        dtype, cases = name.split(" ")[0].rstrip(","), self.cases
        config = self.bundle.recipe.generate.model_copy(update={**self.changes, "dtype": dtype})
        with switched():
            engine = CounterfactualEngine(copied(self.bundle), config, device)
            if "autoencoder float32" in name:
                engine.bundle.vae = copied(self.bundle).vae.to(device).to(memory_format=torch.channels_last).eval()
                engine.model.vae = engine.bundle.vae
            if dtype == "float32":
                switch(**tf32("TF32" in name))
            state = switches()
            made = generate(engine, [case.image for case in cases], self.settings)
        maps = np.stack([attribution(case.image, rebuilt, counterfactual, config)
                         for case, counterfactual, rebuilt in zip(cases, *made, strict=True)])  # fmt: skip
        self.truth = self.truth or (made[0], maps)
        good = np.flatnonzero(np.isfinite(maps).all(axis=(1, 2)))
        values: Values = {"images": len(cases), "not_finite": len(cases) - len(good), "switches": state}
        grey = np.abs(made[0] - self.truth[0])[good] * 255
        apart = np.abs(maps - self.truth[1])[good].mean() / np.abs(self.truth[1][good]).mean() if len(good) else None
        found = [score(positive(maps[n]), cases[n].lesion, cases[n].lungs | cases[n].lesion) for n in good]
        trained = self.subject.model is not None and len(good) > 0
        return {
            **values,
            "grey_levels_apart_mean": float(grey.mean()) if len(good) else None,
            "grey_levels_apart_most": float(grey.max()) if len(good) else None,
            "map_distance": None if apart is None else float(apart),
            "auroc": float(np.mean([one.auroc for one in found if one])) if trained else None,
        }


# (c) a result does not depend on its neighbours


def batch_invariance(book: Book, subject: Subject) -> None:
    steps = subject.sizes.determinism_steps
    settings = setting(num_inference_steps=steps)

    def measured(dtype: str) -> Values:
        with switched():
            small, large = (2, 4) if subject.tiny else (8, 32)
            engine = subject.engine(dtype, micro_batch=small)
            images = subject.images(small)
            seeds = list(range(small))
            whole = generate(engine, images, settings, seeds)[0]
            alone = generate(engine, images[:1], settings, seeds[:1])[0]
            order = [*range(1, small), 0]
            turned = generate(engine, [images[n] for n in order], settings, order)[0]
            engine.config = engine.config.model_copy(update={"micro_batch": large})
            try:
                wide: Any = generate(engine, images, settings, seeds)[0]
            except torch.cuda.OutOfMemoryError:
                wide = None
        for name, same in (
            ("alone, padded, as in company", alone[0].tobytes() == whole[0].tobytes()),
            ("in another slot", turned.tobytes() == whole[order].tobytes()),
        ):
            book.check(f"bitwise the same {name}, {dtype}", same, same, True)
        return {
            f"bitwise_same_in_micro_batches_of_{small}_and_{large}": None
            if wide is None
            else np.array_equal(wide, whole),
            "largest_difference_of_micro_batches": None if wide is None else float(np.abs(wide - whole).max()),
            "finite": bool(np.isfinite(whole).all()),
        }

    for dtype in dict.fromkeys((subject.dtype, "float16")):
        book.row(f"batch invariance, {dtype}", lambda dtype=dtype: measured(dtype), checked=True)


# (f) the host never waits for the device inside the loop


def synchronisations(book: Book, subject: Subject) -> None:
    """PyTorch warns of every operation that waits. Counted at two numbers of steps: the difference is of the loop."""
    bundle = with_extras(small_bundle(subject.tiny))
    engine = subject.engine("float32", bundle, micro_batch=2)
    images = small_images(bundle, 2)
    asked = [("sdedit", scheduler) for scheduler in SAMPLERS]
    left_out = ("sdedit", "instruct-pix2pix")  # counted above; needs a UNet that reads an image
    asked += [(name, method.scheduler or "pndm-diffusers") for name, method in METHODS.items()
              if name not in left_out and method.reads_prompt]  # fmt: skip

    for method, scheduler in asked:

        def counted(method: str = method, scheduler: str = scheduler) -> Values:
            def run(steps: int) -> None:
                settings = setting(method, scheduler, strength=0.5, num_inference_steps=steps)
                generate(engine, images, settings)

            if not subject.cuda:
                run(8)
                return {"waits_per_step": None, "reason": "no CUDA: nothing to count"}
            run(8)
            few, many = waits(lambda: run(8)), waits(lambda: run(16))
            return {"waits_per_step": (many - few) / 4, "waits_in_all": many}

        found = book.row(f"waits for the device, {method}, {scheduler}", counted, checked=True)
        if found and found["waits_per_step"] is not None:
            per_step = found["waits_per_step"]
            book.check(f"no wait in the loop of {method}, {scheduler}", per_step == 0, per_step, 0)


def waits(work: Callable[[], Any]) -> int:
    """Count how often ``work`` waits for the device, with PyTorch's debug mode."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing" in str(one.message) for one in said)


def with_extras(bundle: Bundle) -> Bundle:
    """Add untrained networks for the methods that need an extra network."""
    from diffusers import ControlNetModel

    torch.manual_seed(0)
    channels = bundle.vae.config.latent_channels
    bundle.extras["classifier"] = LatentClassifier(["COVID", "Normal"], "Normal", channels, (8, 16), 4)
    controlnet = ControlNetModel.from_unet(bundle.unet, conditioning_embedding_out_channels=(8, 16, 16))
    controlnet.register_to_config(conditions=["lungs", "edges"])
    for parameter in controlnet.parameters():  # its last layers are zero before it is trained
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    bundle.extras["controlnet"] = controlnet.eval()
    return bundle
