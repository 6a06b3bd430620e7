"""What every method works with: the request, and the latent diffusion model with its guided noise prediction.

The second half of the file holds two exact accelerations of the networks; methods can be read without it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.models.upsampling import Upsample2D
from torch.nn import functional
from torch.utils._pytree import tree_map_only

from diffva_ray.config.recipe import GenerateConfig
from diffva_ray.config.sampling import SamplingSettings
from diffva_ray.counterfactual.composition import Further
from diffva_ray.counterfactual.deep_features import deep_features_kept
from diffva_ray.model.bundle import Bundle
from diffva_ray.model.image_conditioning import with_image
from diffva_ray.model.reverse_sde import ReverseSDE
from diffva_ray.model.schedulers import schedule
from diffva_ray.progress import Stopwatch


@dataclass(frozen=True)
class Edit:
    """The request to a method: a batch of n images and how to edit them. All tensors are on the model's device."""

    images: torch.Tensor  # grey float32 [n, size, size] in [0, 1]
    lungs: torch.Tensor  # bool [n, size, size]; all true for an image without a mask
    latents: torch.Tensor  # float32 [n, 4, h, w], scaled to unit variance
    generators: Sequence[torch.Generator]  # one per image, on the CPU
    prompt: torch.Tensor  # embedding of the target prompt [n, length, width]
    negative: torch.Tensor  # embedding of the guidance's unconditional branch: "" unless a negative prompt is given
    empty: torch.Tensor  # embedding of ""
    source: torch.Tensor  # embedding of what the image shows, for methods that encode it first
    settings: SamplingSettings
    config: GenerateConfig  # the recipe's section ``generate``, with the settings of single methods
    conditions: Mapping[str, torch.Tensor] = field(default_factory=dict)  # own condition images [n, 3, size, size]
    further: Sequence[Further] = ()  # of a composed prompt: embeddings of its other texts, and their weights


@dataclass(frozen=True)
class Generated:
    """Result of a method, grey images [n, size, size] in [0, 1]; a compensated map is the difference of the two."""

    counterfactuals: torch.Tensor  # the edited images
    reconstructions: torch.Tensor  # the method's output without an edit (D(E(image)) where it uses the autoencoder)


def noise(shape: torch.Size, generators: Sequence[torch.Generator]) -> torch.Tensor:
    """Standard normal noise [n, ...], row i from generator i; sampled on the CPU, so it is equal on every device."""
    return torch.cat([torch.randn((1, *shape[1:]), generator=generator) for generator in generators])


def add_noise(scheduler: Any, latents: torch.Tensor, eps: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """Noise ``latents`` with ``eps`` [n, 4, h, w] to a timestep (a scalar), as ``scheduler.add_noise`` does, with both
    factors computed on the CPU: diffusers moves the whole schedule to the latents' device."""
    one, zero, at = torch.ones(1), torch.zeros(1), timestep[None]
    signal: torch.Tensor = scheduler.add_noise(one, zero, at)
    sigma: torch.Tensor = scheduler.add_noise(zero, one, at)
    return signal[0] * latents + sigma[0] * eps


def split(
    output: torch.Tensor, latents: torch.Tensor, alpha: torch.Tensor, prediction_type: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Split noisy ``latents`` into clean latents z_0 and noise eps, by the network's output (``epsilon`` or
    ``v_prediction``) and the timestep's alpha_bar."""
    signal, sigma = alpha.sqrt(), (1 - alpha).sqrt()
    if prediction_type == "v_prediction":
        return signal * latents - sigma * output, signal * output + sigma * latents
    return (latents - sigma * output) / signal, output


class LatentDiffusion:
    """Autoencoder and UNet with classifier-free guidance; latents are float32, networks run in their own dtype.

    Timesteps and noise levels stay on the CPU. A scalar on the CPU is an argument of a kernel, while one on the device
    that the CPU has to know, or that is copied there step by step, would make the CPU wait for the GPU in every step.
    """

    def __init__(self, bundle: Bundle, watch: Stopwatch | None = None) -> None:
        self.bundle, self.vae, self.unet = bundle, bundle.vae, bundle.unet
        self.watch = watch or Stopwatch()  # of the stages "encode" and "decode"
        self.scale: float = bundle.vae.config.scaling_factor
        self.compiled = False  # whether the networks are, so that each shape should come in one memory layout
        self._timesteps: dict[float, torch.Tensor] = {}  # on the networks' device, by value
        training = DDPMScheduler.from_config(bundle.scheduler)
        self.alphas: torch.Tensor = training.alphas_cumprod  # alpha_bar of every training timestep
        self.final_alpha: torch.Tensor = DDIMScheduler.from_config(bundle.scheduler).final_alpha_cumprod  # of an image
        self.prediction_type: str = training.config.prediction_type

    @cached_property
    def shared_start(self) -> SharedStart:
        """In which both branches of guidance share their start."""
        return SharedStart(self.unet)

    def compile(self, backend: str | Callable[..., Any]) -> None:
        """Compile the networks for one shape, a micro-batch's, or two; what cannot be compiled whole must not run
        uncompiled unnoticed."""
        _ = self.shared_start  # the UNet has its hooks before it is compiled
        for network in (self.unet, self.vae.encoder, self.vae.decoder):
            network.compile(backend=backend, dynamic=False, fullgraph=True)
        self.compiled = True

    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Posterior mean and standard deviation, unscaled, of grey images [n, size, size] in [0, 1]."""
        with self.watch("encode"):
            pixels = images.to(next(self.vae.parameters()).dtype)[:, None].expand(-1, 3, -1, -1) * 2 - 1
            posterior = self.vae.encode(pixels.contiguous()).latent_dist
            return posterior.mean, posterior.std

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Grey images [n, size, size] in [0, 1] of latents of unit variance: the mean of the three channels, each
        clamped first as in diffusers. NaN where a channel is not finite, because a clamp turns infinity into grey."""
        with self.watch("decode"):
            dtype = next(self.vae.parameters()).dtype
            colours = self.vae.decode((latents / self.scale).to(dtype)).sample.float() / 2 + 0.5
            return torch.where(colours.isfinite().all(dim=1), colours.clamp(0, 1).mean(dim=1), torch.nan)

    def generated(self, latents: torch.Tensor, request: Edit) -> Generated:
        """Decode the edited latents and the image's own: the last step of a method that edits in latent space alone."""
        return Generated(self.decode(latents), self.decode(request.latents))

    def schedule(self, request: Edit, **changes: Any) -> tuple[Any, torch.Tensor]:
        """A new scheduler, and the timesteps that the strength leaves (falling); ``changes`` of its configuration."""
        scheduler, timesteps = schedule(
            request.settings.scheduler,
            {**self.bundle.scheduler, **changes},
            request.settings.num_inference_steps,
            request.settings.strength,
        )
        on_device = timesteps.to(request.latents.device)  # one copy for all steps
        self._timesteps |= zip(timesteps.tolist(), on_device.unbind(), strict=True)
        return scheduler, timesteps

    def on_device(self, timestep: torch.Tensor) -> torch.Tensor:
        """A timestep (a scalar on the CPU) on the networks' device, copied there once in the life of the model."""
        value = timestep.item()
        if value not in self._timesteps:
            self._timesteps[value] = timestep.to(next(self.unet.parameters()).device)
        return self._timesteps[value]

    def predict(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        embedding: torch.Tensor,
        image: torch.Tensor | None = None,
        **residuals: Any,
    ) -> torch.Tensor:
        """The network's output (noise or velocity) [n, 4, h, w] in float32. ``image`` are the latents, not scaled, of
        an image that the network reads; ``residuals`` are a ControlNet's."""
        dtype = next(self.unet.parameters()).dtype
        states = embedding.to(dtype).contiguous() if self.compiled else embedding.to(dtype)
        latents = with_image(self.unet, latents, image)
        t = self.on_device(timestep)
        output: torch.Tensor = self.unet(latents.to(dtype), t, encoder_hidden_states=states, **residuals).sample
        return output.float()

    def guided(self, latents: torch.Tensor, timestep: torch.Tensor, request: Edit, **residuals: Any) -> torch.Tensor:
        """Classifier-free guidance (Ho & Salimans 2022), both branches in one batch. As in diffusers, a guidance scale
        of 1 or less switches it off, and the prompt alone is used. Further texts of a composed prompt are added, each
        by a call of its own."""
        if request.settings.guidance_scale <= 1:
            return self.predict(latents, timestep, request.prompt, **residuals)
        embedding = torch.cat([request.negative, request.prompt])
        with self.shared_start:
            both = self.predict(torch.cat([latents, latents]), timestep, embedding, **residuals)
        negative, prompt = both.chunk(2)
        output = negative + request.settings.guidance_scale * (prompt - negative)
        for embedding, weight in request.further:
            of_text = self.predict(latents, timestep, embedding, **residuals)
            output = output + request.settings.guidance_scale * weight * (of_text - negative)
        return output

    def denoise(self, latents: torch.Tensor, request: Edit, scheduler: Any, timesteps: torch.Tensor) -> torch.Tensor:
        """Run the scheduler over ``timesteps`` under guidance, with the accelerations of ``request.config``."""
        acceleration = request.config.acceleration
        with deep_features_kept(self.unet, acceleration.deep_features_every):
            for i, t in enumerate(timesteps):
                # Scale the input: the latents of Euler's method have the variance of the noise.
                scaled = scheduler.scale_model_input(latents, t)

                # Classifier-free guidance, or the prompt alone in steps without guidance.
                if acceleration.guides(i, len(timesteps)):
                    output = self.guided(scaled, t, request)
                else:
                    output = self.predict(scaled, t, request.prompt)

                # Sampler step.
                latents = self.step(output, t, latents, request, scheduler)
        return latents

    def step(
        self, output: torch.Tensor, timestep: torch.Tensor, latents: torch.Tensor, request: Edit, scheduler: Any
    ) -> torch.Tensor:
        """One step of the scheduler; noise that the scheduler adds comes from each image's own generator."""
        options = {"generator": list(request.generators)} if isinstance(scheduler, ReverseSDE) else {}
        previous: torch.Tensor = scheduler.step(output, timestep, latents, **options).prev_sample
        return previous


class FourPhases(torch.nn.Module):
    """``Upsample2D``'s nearest-neighbour doubling and 3x3 convolution as four 2x2 convolutions of the small image.

    Of the nine pixels under the kernel only four differ, so the kernel's taps are summed beforehand (Shi et al. 2016,
    "Is the deconvolution layer the same as a convolutional layer?"). Equal up to rounding, at 4/9 of the operations.
    """

    bias: torch.Tensor | None

    def __init__(self, convolution: Any) -> None:
        super().__init__()
        first, middle, last = convolution.weight.detach().float().unbind(2)
        rows = (torch.stack([first, middle + last], 2), torch.stack([first + middle, last], 2))
        for y, row in enumerate(rows):
            first, middle, last = row.unbind(3)
            for x, taps in enumerate(([first, middle + last], [first + middle, last])):
                kernel = torch.stack(taps, 3).to(convolution.weight.dtype)  # [out, in, 2, 2]
                self.register_buffer(f"kernel_{y}{x}", kernel.contiguous(memory_format=torch.channels_last))
        self.out_channels = convolution.out_channels
        self.register_buffer("bias", convolution.bias)

    def forward(self, hidden_states: torch.Tensor, output_size: Any = None) -> torch.Tensor:
        n, _, height, width = hidden_states.shape
        doubled = hidden_states.new_empty(n, height, 2, width, 2, self.out_channels)
        for y, x in itertools.product((0, 1), (0, 1)):
            padded = functional.pad(hidden_states, (1 - x, x, 1 - y, y))
            phase = functional.conv2d(padded, getattr(self, f"kernel_{y}{x}"), self.bias)
            doubled[:, :, y, :, x] = phase.permute(0, 2, 3, 1)
        return doubled.view(n, 2 * height, 2 * width, -1).permute(0, 3, 1, 2)  # channels last, like its neighbours


def speed_up_doubling(network: Any) -> None:
    """Replace every upsampler of a UNet or an autoencoder that doubles and convolves by ``FourPhases``."""
    for parent in list(network.modules()):
        for name, child in parent.named_children():
            plain = isinstance(child, Upsample2D) and child.interpolate and child.use_conv and child.norm is None
            if plain and child.conv.kernel_size == (3, 3):
                setattr(parent, name, FourPhases(child.conv))


class SharedStart:
    """Context in which a UNet computes the layers before its first cross-attention once for both branches of guidance.

    For batches [negative branch, prompt branch] of the same latents: the branches are equal until a layer reads text.
    The hooks stay on the UNet and ask whether the context is open, so that a compiled UNet has them as well: it has one
    graph for each answer, but does not see hooks that come and go.
    """

    def __init__(self, unet: Any) -> None:
        self.open = False
        for module in _before_cross_attention(unet):
            module.register_forward_pre_hook(self._halve, with_kwargs=True)
            module.register_forward_hook(self._double)

    def __enter__(self) -> None:
        self.open = True

    def __exit__(self, *_: object) -> None:
        self.open = False

    def _halve(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return tree_map_only(torch.Tensor, lambda tensor: tensor.chunk(2)[0], (args, kwargs)) if self.open else None

    def _double(self, module: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return tree_map_only(torch.Tensor, lambda tensor: torch.cat([tensor, tensor]), output) if self.open else None


def _before_cross_attention(unet: Any) -> Iterator[torch.nn.Module]:
    """The layers of a UNet2DConditionModel before the first one that reads text."""
    yield unet.conv_in
    for block in unet.down_blocks:
        if not getattr(block, "has_cross_attention", False):
            yield block
            continue
        first = block.attentions[0].transformer_blocks[0]
        yield from (block.resnets[0], block.attentions[0].norm, block.attentions[0].proj_in, first.norm1)
        if not first.only_cross_attention:
            yield first.attn1
        return
