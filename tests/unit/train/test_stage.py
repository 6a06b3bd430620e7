"""Every kind of stage that a recipe may name is implemented."""

from __future__ import annotations

import importlib
from typing import get_args

from diffva_ray.config.stages import Stage
from diffva_ray.train import stage


def test_every_kind_in_a_recipe_has_a_stage() -> None:
    union = get_args(get_args(Stage)[0])
    named = [kind for config in union for kind in get_args(config.model_fields["trains"].annotation)]
    assert sorted(named) == sorted(stage.KINDS)


def test_every_kind_is_a_stage() -> None:
    for path in stage.KINDS.values():
        module, _, name = path.partition(":")
        assert issubclass(getattr(importlib.import_module(f"diffva_ray.train.{module}"), name), stage.Stage)
