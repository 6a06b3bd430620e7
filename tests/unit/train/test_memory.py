"""The estimate of a training's GPU memory, and that the cluster's GPU is large enough for our recipe."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from trainings import run, weights, with_stages

from diffva_ray.cli import main
from diffva_ray.config.recipe import Recipe, load_recipe, make_recipe, to_yaml
from diffva_ray.storage.local import LocalStore
from diffva_ray.train.loop import prepare
from diffva_ray.train.memory import GPUS, MemoryNeed, memory_lines, memory_need, must_recompute

ROOT = Path(__file__).parents[3]
STAGE = {"name": "joint", "trains": "denoiser", "steps": 2, "batch_size": 4, "learning_rate": 1e-3}


def need_of(recipe: Recipe, images: Path, checkpointing: bool = False, workers: int = 1) -> MemoryNeed:
    bundle, _, stages = prepare(recipe, str(images), LocalStore("unused"))
    need = memory_need(bundle, stages, recipe.train, workers, checkpointing)
    assert need is not None
    return need


def test_what_is_trained_is_counted(tiny: Recipe, images: Path) -> None:
    recipe = with_stages(tiny, {**STAGE, "ema_decay": 0.9}, {**STAGE, "name": "w", "trainable": "cross-attention"})
    bundle, _, _ = prepare(recipe, str(images), LocalStore("unused"))
    count = sum(each.numel() for module in (bundle.unet, bundle.text_encoder) for each in module.parameters())
    need = need_of(recipe, images)
    assert (need.stage, need.optimizer) == ("joint", pytest.approx(8 * count / 1e9))
    assert need.average == pytest.approx(need.optimizer / 2)
    assert need.step > 4 * count / 1e9  # the gradients are in it


def test_more_images_need_more_and_recomputed_ones_less(tiny: Recipe, images: Path) -> None:
    one, many = (need_of(with_stages(tiny, {**STAGE, "batch_size": size}), images).step for size in (1, 64))
    assert many > 4 * one
    recipe = with_stages(tiny, {**STAGE, "batch_size": 64})
    assert need_of(recipe, images, checkpointing=True).step < 0.7 * many
    assert need_of(recipe, images, workers=16).step < 0.2 * many
    assert need_of(with_stages(tiny, {**STAGE, "batch_size": 64, "micro_batch_size": 1}), images).step < 0.2 * many


def test_the_estimate_is_what_a_step_keeps(tiny: Recipe, images: Path) -> None:
    """Against the tensors that autograd keeps in a forward pass of the same network."""
    recipe = with_stages(tiny, {**STAGE, "batch_size": 64})
    bundle, _, stages = prepare(recipe, str(images), LocalStore("unused"))
    network, kept = stages[0].trainables[0].network, dict[int, int]()
    weights = {each.untyped_storage().data_ptr() for each in network.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.ones(5, bundle.tokenizer.model_max_length, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = network(torch.randn(64, 4, 8, 8), torch.zeros(64).long(), tokens, tokens, torch.zeros(64).long())
    need = need_of(recipe, images)
    assert output.requires_grad
    assert 1.0 <= need.step * 1e9 / sum(kept.values()) < 1.5


def test_a_dry_run_says_it(tiny: Recipe, images: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(to_yaml(with_stages(tiny, STAGE, gradient_checkpointing="auto")))
    words = ["train", "--data", str(images), "--out", str(tmp_path / "model"), "--recipe", str(recipe), "--dry-run"]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, done.output
    without, recomputed = (line for line in json.loads(done.stdout)["summary"] if line.startswith("GPU memory"))
    assert without.endswith("fits T4 (g4dn) and larger")
    assert "with gradient checkpointing" in recomputed


def test_only_a_gpu_that_is_too_small_recomputes(
    tiny: Recipe, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = with_stages(tiny, STAGE, gradient_checkpointing="auto")
    bundle, _, stages = prepare(recipe, str(images), LocalStore("unused"))
    assert not must_recompute(bundle, stages, recipe.train, 1)  # no GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for gigabytes, expected in ((80, False), (1, True)):
        properties = type("Properties", (), {"total_memory": gigabytes * 10**9})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, found=properties: found)
        assert must_recompute(bundle, stages, recipe.train, 1) is expected
    monkeypatch.undo()
    # and the weights are the same
    for way in (True, False):
        run(with_stages(tiny, STAGE, gradient_checkpointing=way), images, tmp_path / str(way))
    one, other = (weights(tmp_path / str(way), "unet", "text_encoder") for way in (True, False))
    assert all(torch.allclose(one[name], other[name], atol=1e-6) for name in one)


@pytest.mark.slow
def test_the_cluster_file_has_a_gpu_for_our_recipe(images: Path) -> None:
    """At Stable Diffusion's size, with random weights."""
    values = load_recipe("recommended").model_dump(mode="json")
    values["model"] = load_recipe(str(ROOT / "benchmarks/sd14_random.yaml")).model_dump(mode="json")["model"]
    recipe = make_recipe(values)
    bundle, _, stages = prepare(recipe, str(images), LocalStore("unused"))
    lines = memory_lines(bundle, stages, recipe.train, 1)
    assert all("too much for T4 (g4dn), A10G (g5), L4 (g6); fits" in line for line in lines)
    nodes = yaml.safe_load((ROOT / "cluster/aws.yaml").read_text())["available_node_types"]
    family = nodes["gpu_spot"]["node_config"]["InstanceType"].partition(".")[0]
    (size,) = (size for name, size in GPUS.items() if name.endswith(f"({family})"))
    need = memory_need(bundle, stages, recipe.train, 1, False)
    assert need is not None
    assert need.total < size
