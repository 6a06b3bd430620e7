"""Section 3, networks: a call of the UNet and of the autoencoder, in every variant that somebody might choose."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch.nn import functional
from torch.nn.attention import sdpa_kernel

from diffva_ray.counterfactual.engine import CounterfactualEngine
from gpu_sections.book import Book, Values
from gpu_sections.ceilings import BACKENDS
from gpu_sections.measure import (
    Work,
    forget_peak,
    launches,
    operations,
    peak_gib,
    relative_error,
    release,
    switched,
    switches,
    timed,
)
from gpu_sections.subject import GUIDANCE, Subject, compiled, guidance_of, operations_of

Call = Callable[[torch.Tensor, Any, torch.Tensor], torch.Tensor]  # latents, request, timestep: guided noise


@dataclass
class Bench:
    """Networks that are ready, so that no variant waits for another one's, and what was found to be fastest."""

    subject: Subject
    credited: dict[str, float]  # TFLOP of one sample
    plain: Any = None  # UNets
    channels_last: Any = None
    shared_start: Any = None  # of ``channels_last``
    ours: CounterfactualEngine | None = None
    compiled: CounterfactualEngine | None = None
    truth: dict[int, torch.Tensor] = field(default_factory=dict)
    executed: dict[tuple[str, int], float] = field(default_factory=dict)  # TFLOP of a call, by variant and images
    best_attention: str | None = None
    own_switches: dict[str, bool] = field(default_factory=dict)  # that the engine has set

    def switches_of(self, name: str) -> dict[str, bool]:
        return self.own_switches if "ours" in name else {}


def section(book: Book, subject: Subject) -> Bench:
    bench = Bench(subject, operations_of(subject))
    book.note(
        tflop_of_one_sample={name: round(value, 5) for name, value in bench.credited.items()}, dtype=subject.dtype
    )
    prepare(book, bench)
    first, *others = subject.sizes.unet_images
    unets(book, bench, first, compile_too=True)
    autoencoders(book, bench)
    attentions(book, bench, first)
    anatomy(book, bench, first)
    for count in others:
        unets(book, bench, count, compile_too=False)
    for count in others[:1]:  # at another size it compiles anew
        compiled_unets(book, bench, count)
    if bench.compiled is not None and bench.best_attention and subject.cuda:
        compiled_attention(book, bench, first, bench.best_attention)
    return bench


def prepare(book: Book, bench: Bench) -> None:
    subject = bench.subject
    kind = getattr(torch, subject.dtype)

    def networks() -> Values:
        with switched():
            bench.plain = copy.deepcopy(subject.resident.unet).to(subject.device, kind).eval().requires_grad_(False)
            bench.channels_last = copy.deepcopy(bench.plain).to(memory_format=torch.channels_last)
            bench.ours = subject.engine()
            state = switches()
        bench.own_switches = {name: value for name, value in state.items() if isinstance(value, bool)}
        return {"switches_of_the_engine": state}

    book.row("networks", networks)


def unets(book: Book, bench: Bench, count: int, compile_too: bool) -> None:
    """All eager variants at ``count`` images, which are twice as many samples under guidance."""
    bench.truth.pop(count, None)
    on_device = torch.tensor(401, device=bench.subject.device)
    plain = lambda network: lambda latents, request, timestep: by_hand(network, latents, request, timestep)  # noqa: E731
    unet_row(book, bench, "diffusers, eager, NCHW", count, plain(bench.plain), on_device)
    unet_row(book, bench, "diffusers, eager, channels_last", count, plain(bench.channels_last), on_device)
    if bench.ours is None:
        return
    model = bench.ours.model
    guided: Call = lambda latents, request, timestep: model.guided(latents, timestep, request)  # noqa: E731
    unet_row(book, bench, "ours, as the engine calls it", count, guided, torch.tensor(401))
    unet_row(book, bench, "ours, timestep on the device", count, guided, on_device)
    unet_row(book, bench, "ours without the shared start", count, plain(bench.ours.bundle.unet), on_device)
    unet_row(book, bench, "ours without FourPhases", count, shared(bench), on_device)
    unet_row(book, bench, "ours, CUDA graph", count, guided, on_device, graph=True)
    if compile_too:
        compiled_unets(book, bench, count)


def compiled_unets(book: Book, bench: Bench, count: int) -> None:
    on_device = torch.tensor(401, device=bench.subject.device)

    def compile_ours() -> Values:
        with switched():
            engine = bench.subject.engine(micro_batch=count)
            by = compiled(engine, bench.subject.tiny)
        bench.compiled = engine
        return {"compiled_by": by}

    if bench.compiled is None:
        book.row("compiling is set up", compile_ours)
    if bench.compiled is None:
        return
    model = bench.compiled.model
    guided: Call = lambda latents, request, timestep: model.guided(latents, timestep, request)  # noqa: E731
    first = unet_row(book, bench, "ours, compiled, timestep on the device", count, guided, on_device, expected=10)
    if first is None:
        if count == bench.subject.sizes.compiled_images:
            bench.compiled = None  # nor would it be ready in time in another section
        return
    unet_row(book, bench, "ours, compiled, CUDA graph", count, guided, on_device, graph=True)
    unet_row(book, bench, "ours, compiled, as the engine calls it", count, guided, torch.tensor(401), expected=10)


def by_hand(network: Any, latents: torch.Tensor, request: Any, timestep: torch.Tensor) -> torch.Tensor:
    """Guidance as diffusers' pipeline has it: one call of 2n samples."""
    kind = next(network.parameters()).dtype
    states = torch.cat([request.negative, request.prompt])
    doubled = torch.cat([latents, latents]).to(kind)
    both = network(doubled, timestep, encoder_hidden_states=states, return_dict=False)[0].float()
    negative, prompt = both.chunk(2)
    return negative + GUIDANCE * (prompt - negative)


def shared(bench: Bench) -> Call:
    """The branches' shared start on a UNet with its own upsamplers."""
    from diffva_ray.counterfactual.latent_diffusion import SharedStart

    if bench.shared_start is None:
        bench.shared_start = SharedStart(bench.channels_last)
    start = bench.shared_start

    def call(latents: torch.Tensor, request: Any, timestep: torch.Tensor) -> torch.Tensor:
        with start:
            return by_hand(bench.channels_last, latents, request, timestep)

    return call


def unet_row(
    book: Book, bench: Bench, name: str, count: int, call: Call, timestep: torch.Tensor,
    graph: bool = False, expected: float = 0.0,
) -> Values | None:  # fmt: skip
    subject = bench.subject
    if graph and not subject.cuda:
        return None

    def work() -> Values:
        side = subject.latent_side
        latents = subject.random(count, 4, side, side, dtype="float32", seed=7)
        request = guidance_of(subject, subject.dtype, count)
        values: Values = {"images": count, "samples": 2 * count}
        with torch.inference_mode(), switched(**bench.switches_of(name)):
            once: Work = lambda: call(latents, request, timestep)  # noqa: E731
            forget_peak(subject.device)
            if graph:
                once = captured(once)
            found = once().clone()
            if name.startswith("diffusers, eager, NCHW"):
                bench.truth[count] = found
            if count in bench.truth:
                values["relative_difference_to_diffusers"] = relative_error(found, bench.truth[count])
            timing = timed(once, subject.device, subject.sizes.calls, most_seconds=3)
            if "compiled" not in name and not graph:
                bench.executed[name, count] = operations(lambda: call(latents, request, timestep))
        # what is compiled or captured passes by the dispatcher once; it executes what its eager counterpart does
        executed = bench.executed.get((name, count), bench.executed.get(("ours, timestep on the device", count)))
        return {
            **values,
            "tflop_per_second_credited": round(2 * count * bench.credited["unet"] / timing.seconds, 2),
            "tflop_per_second_executed": None if executed is None else round(executed / timing.seconds, 2),
            "tflop_executed": executed,
            **timing.values(),
            "peak_gib": peak_gib(subject.device),
        }

    most = 0.5 if "compiled" in name else 1.0  # of the section: a compiler that hangs leaves something to the others
    return book.row(f"UNet, {2 * count} samples, {name}", work, expected, most=most)


def captured(work: Work) -> Work:
    """``work`` as one CUDA graph over the same tensors. Raises what the capture raises, such as on a wait in it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()

    def replay() -> torch.Tensor:
        graph.replay()
        return result

    return replay


def attentions(book: Book, bench: Bench, count: int) -> None:
    """Attention's backends in our eager UNet, and with head widths that are padded to a multiple of 64."""
    if bench.ours is None:
        return
    model, on_device = bench.ours.model, torch.tensor(401, device=bench.subject.device)
    best = float("inf")
    for name in ("flash", "efficient", "cudnn"):
        for padded in (False, True):

            def call(latents: torch.Tensor, request: Any, timestep: torch.Tensor, name: str = name,
                     padded: bool = padded) -> torch.Tensor:  # fmt: skip
                with sdpa_kernel(BACKENDS[name]), padded_heads() if padded else nullcontext():
                    return model.guided(latents, timestep, request)

            label = f"ours, attention {name}{', heads padded to 64' if padded else ''}"
            found = unet_row(book, bench, label, count, call, on_device)
            if found is not None and found["ms"] < best:
                best, bench.best_attention = found["ms"], name if not padded else f"{name}, padded"
    book.note(best_attention_eager=bench.best_attention)


def compiled_attention(book: Book, bench: Bench, count: int, best: str) -> None:
    """Attention's backend is chosen when a network is traced, so this one is compiled for itself."""
    name, _, padding = best.partition(", ")
    with switched():
        engine = bench.subject.engine(micro_batch=count)
        compiled(engine, bench.subject.tiny)

    def call(latents: torch.Tensor, request: Any, timestep: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(BACKENDS[name]), padded_heads() if padding else nullcontext():
            return engine.model.guided(latents, timestep, request)

    on_device = torch.tensor(401, device=bench.subject.device)
    unet_row(book, bench, f"ours, compiled, attention {best}", count, call, on_device, expected=30)


def padded_heads() -> AbstractContextManager[Any]:
    """While it is open, attention with heads whose width is no multiple of 64 gets zeros up to one."""
    plain = functional.scaled_dot_product_attention

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **words: Any) -> torch.Tensor:
        width = q.shape[-1]
        more = -width % 64
        if not more:
            return plain(q, k, v, *rest, **words)
        words["scale"] = words.get("scale") or width**-0.5
        q, k, v = (functional.pad(part, (0, more)) for part in (q, k, v))
        return plain(q, k, v, *rest, **words)[..., :width]

    return patch.object(functional, "scaled_dot_product_attention", attention)


def anatomy(book: Book, bench: Bench, count: int) -> None:
    """Kernels of one call, and what the host needs to submit it."""
    subject = bench.subject
    if not subject.cuda:
        book.leave_out("kernels of a call", "no CUDA")
        return
    on_device = torch.tensor(401, device=subject.device)
    latents = subject.random(count, 4, subject.latent_side, subject.latent_side, dtype="float32", seed=7)
    request = guidance_of(subject, subject.dtype, count)
    engines = {"ours": bench.ours, "ours, compiled": bench.compiled}
    calls: dict[str, Work] = {"diffusers, eager, NCHW": lambda: by_hand(bench.plain, latents, request, on_device)}
    calls |= {
        name: lambda engine=engine: engine.model.guided(latents, on_device, request)
        for name, engine in engines.items()
        if engine is not None
    }
    for name, call in calls.items():

        def counted(call: Work = call, name: str = name) -> Values:
            with torch.inference_mode(), switched(**bench.switches_of(name)):
                return {"images": count, "kernels_and_copies": launches(call, subject.device)}

        book.row(f"kernels of a call, {2 * count} samples, {name}", counted)


def autoencoders(book: Book, bench: Bench) -> None:
    """Encoder and decoder, plain and ours, over batches and dtypes."""
    subject = bench.subject
    others = [dtype for dtype in ("bfloat16", "float16", "float32") if dtype != subject.dtype]
    for dtype in (subject.dtype, *others):
        autoencoder(
            book, bench, dtype, subject.sizes.vae_images if dtype == subject.dtype else subject.sizes.vae_images[:1]
        )
        release()


def autoencoder(book: Book, bench: Bench, dtype: str, counts: tuple[int, ...]) -> None:
    subject, ready = bench.subject, list[Any]()

    def networks() -> None:
        with switched():
            vae = copy.deepcopy(subject.resident.vae).to(subject.device, getattr(torch, dtype)).eval()
            ready.extend([vae.requires_grad_(False), subject.engine(dtype)])

    book.row(f"autoencoder, {dtype}", networks)
    if len(ready) < 2:
        return
    vae, engine = ready
    for count in counts:
        for name, (network, call) in autoencoder_calls(bench, vae, engine, dtype, count).items():
            book.row(f"{name}, {count} images, {dtype}", partial(autoencoder_row, bench, name, network, call, count))


def autoencoder_calls(
    bench: Bench, vae: Any, engine: CounterfactualEngine, dtype: str, count: int
) -> dict[str, tuple[str, Work]]:
    """Name of a row: the network whose operations it is credited with, and the call."""
    subject, kind = bench.subject, getattr(torch, dtype)
    pixels, side = subject.recipe.model.resolution, subject.latent_side
    images = torch.rand(count, pixels, pixels, device=subject.device)
    latents = subject.random(count, 4, side, side, dtype="float32")
    three = (images[:, None] * 2 - 1).expand(-1, 3, -1, -1).contiguous().to(kind)
    calls: dict[str, tuple[str, Work]] = {
        "encode, diffusers, eager, NCHW": ("encode", lambda: vae.encode(three).latent_dist.mean),
        "encode, ours": ("encode", lambda: engine.model.encode(images)),
        "decode, diffusers, eager, NCHW": ("decode", lambda: vae.decode(latents.to(kind)).sample),
        "decode, ours": ("decode", lambda: engine.model.decode(latents)),
    }
    if bench.compiled is not None and dtype == subject.dtype and count == subject.sizes.compiled_images:
        whole = bench.compiled.model
        calls["encode, ours, compiled"] = ("encode", lambda: whole.encode(images))
        calls["decode, ours, compiled"] = ("decode", lambda: whole.decode(latents))
    return calls


def autoencoder_row(bench: Bench, name: str, network: str, call: Work, count: int) -> Values:
    subject = bench.subject
    with torch.inference_mode(), switched(**bench.switches_of(name)):
        forget_peak(subject.device)
        timing = timed(call, subject.device, subject.sizes.calls, most_seconds=2)
        executed = None if "compiled" in name else operations(call) / timing.seconds
    return {
        "images": count,
        "tflop_per_second_credited": round(count * bench.credited[network] / timing.seconds, 2),
        "tflop_per_second_executed": None if executed is None else round(executed, 2),
        **timing.values(),
        "peak_gib": peak_gib(subject.device),
    }
