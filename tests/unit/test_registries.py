"""Tables that name the same things in two places, because drivers must not load torch, agree."""

from __future__ import annotations

from typing import get_args

from diffva_ray.config.methods import METHODS
from diffva_ray.config.sampling import Scheduler
from diffva_ray.config.training import Stage
from diffva_ray.counterfactual.methods import GENERATE
from diffva_ray.model.card import EXTRAS
from diffva_ray.model.extras import NETWORKS
from diffva_ray.model.schedulers import SCHEDULERS
from diffva_ray.train.kinds import KINDS


def test_every_kind_of_stage_of_a_recipe_is_implemented() -> None:
    union = get_args(get_args(Stage)[0])
    named = [kind for config in union for kind in get_args(config.model_fields["trains"].annotation)]
    assert sorted(named) == sorted(KINDS)


def test_every_method_has_a_function_and_a_network_that_can_be_loaded() -> None:
    assert list(GENERATE) == list(METHODS)
    assert list(NETWORKS) == list(EXTRAS)
    assert {method.needs for method in METHODS.values()} - {""} <= set(EXTRAS)


def test_every_scheduler_of_a_recipe_is_implemented() -> None:
    assert sorted(get_args(Scheduler)) == sorted(SCHEDULERS)
