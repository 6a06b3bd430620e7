"""The sampling settings: the values that decide how one counterfactual is generated, and that a sweep may vary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator

from diffva_ray.config.methods import METHODS
from diffva_ray.config.stages import Section

Scheduler = Literal["pndm", "pndm-diffusers", "ddim", "dpmsolver++", "unipc", "euler", "vp-sde", "ve-sde"]


class SamplingSettings(Section):
    """How to generate a counterfactual. The keys that ``--sweep`` takes and the options of the commands are made of
    these fields; recipe section ``generate`` and the columns of plan and records repeat their names.

    Raises:
        ValueError: A value is outside its range, or a name is unknown.

    Examples:
        >>> SamplingSettings(strength=0.3).replace(guidance_scale=2).strength
        0.3
    """

    method: str = Field("sdedit", json_schema_extra={"enum": list(METHODS)})
    """Counterfactual method (docs/methods.md)."""

    scheduler: Scheduler = "pndm"
    """Sampler; methods that invert the image need ``ddim``."""

    strength: float = Field(0.55, gt=0, le=1)
    """Fraction of the noise schedule that is applied to the image before denoising."""

    guidance_scale: float = Field(4.0, ge=0)
    """Scale of classifier-free guidance towards the prompt; 1 or less turns guidance off."""

    num_inference_steps: int = Field(75, ge=1, le=1000)
    """Sampler steps at strength 1; ``strength`` * steps are run."""

    @field_validator("method")
    @classmethod
    def _known(cls, method: str) -> str:
        if method not in METHODS:
            raise ValueError(f"no such method; there are {', '.join(METHODS)}")
        return method

    @staticmethod
    def of(values: Mapping[str, Any]) -> SamplingSettings:
        """The settings in a row of a plan or of records, or in any mapping that has their names.

        Raises:
            ValueError: As the constructor.
            KeyError: A name is missing.
        """
        return SamplingSettings(**{name: values[name] for name in SamplingSettings.model_fields})

    def replace(self, **changes: Any) -> SamplingSettings:
        """The same settings with some values changed.

        Args:
            changes: New values by name.

        Returns:
            The new settings; these stay as they are.

        Raises:
            ValueError: A value is outside its range or a name is unknown; the message is one line.
        """
        try:
            return SamplingSettings(**{**self.model_dump(), **changes})
        except ValidationError as error:
            first = error.errors()[0]
            reason = first["msg"].removeprefix("Value error, ")
            raise ValueError(f"{first['loc'][0]}: {reason} (got {first['input']!r})") from None


SWEEPABLE = (*SamplingSettings.model_fields, "prompt")  # keys of --sweep; their values name a setting of a run


def parse_value(key: str, text: str) -> Any:
    """The value of a key of SWEEPABLE from the text of an option. Raises ValueError for text that is not a number."""
    kind = SamplingSettings.model_fields[key].annotation if key in SamplingSettings.model_fields else str
    return kind(text) if kind in (int, float) else text
