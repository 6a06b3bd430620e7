"""Everything a test may need: a private home, a tiny untrained model in the real format, a few phantoms."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

try:
    from xdist.scheduler import LoadScopeScheduling
except ImportError:  # a single test runs without xdist, too
    LoadScopeScheduling = object

os.environ["HOME"] = tempfile.mkdtemp(prefix="diffva-home-")
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("RAY_ADDRESS", None)
# Several processes test at once: each keeps to a core, and Ray's workers, nice by default, do not wait for the others.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAY_worker_niceness", "0")

from diffva_ray.config.methods import METHODS
from diffva_ray.config.recipe import Recipe, load_recipe
from diffva_ray.data.phantoms import phantom_set
from diffva_ray.storage.local import LocalStore

ROOT = Path(__file__).parents[1]
CLUSTERS = ("ray", "jobs", "chaos")  # folders of tests that start Rays: one at a time, or they starve each other


class ByFile(LoadScopeScheduling):
    """What one of several processes keeps to itself (``pytest -n 2``): a file, or all Rays."""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "ray" if Path(file).parts[1] in CLUSTERS else file


def pytest_unconfigure() -> None:
    shutil.rmtree(os.environ["HOME"], ignore_errors=True)


@pytest.hookimpl(optionalhook=True)  # unknown under -p no:xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile:
    return ByFile(config, log)


if TYPE_CHECKING:
    from diffva_ray.model.bundle import Bundle

TINY = (
    "name=tiny",
    "model.resolution=32",
    "model.vae.block_out_channels=[8, 8, 16]",
    "model.vae.norm_num_groups=4",
    "model.unet.block_out_channels=[16, 32]",
    "model.unet.sample_size=8",
    "model.unet.norm_num_groups=8",
    "generate.num_inference_steps=4",
    "generate.smoothing=0.016",
    "generate.micro_batch=4",
    "generate.shard_size=6",
    "train.checkpoint_every=2",
    "train.stages.0.steps=4",
    "train.stages.0.batch_size=4",
    "train.stages.1.steps=4",
    "train.stages.1.batch_size=4",
    "train.stages.2.steps=2",
    "train.stages.2.batch_size=4",
)


@pytest.fixture(scope="session")
def tiny() -> Recipe:
    """The phantom recipe at toy size: 32 px, a few steps of everything."""
    return load_recipe("phantom", TINY)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 phantoms of 32 px, six of each class."""
    folder = tmp_path_factory.mktemp("images")
    for _ in phantom_set(LocalStore(str(folder)), 24, 32, seed=11):
        pass
    return folder


@pytest.fixture(scope="session")
def model(tiny: Recipe, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model after a few training steps, exported by the training loop itself (no Ray)."""
    from diffva_ray.train.checkpoint import Checkpoints
    from diffva_ray.train.loop import train

    folder = tmp_path_factory.mktemp("model") / "tiny"
    report = Checkpoints(folder / ".train", 2)
    train(
        tiny,
        str(images),
        str(folder),
        fingerprint="tiny",
        provenance={"data_kind": "phantoms"},
        report=report,
        threads=1,
    )
    return folder


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel as a release builds it, from the files that git knows."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("diffva_ray", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        source.mkdir(exist_ok=True)
        copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*command, str(source)], check=True, capture_output=True, timeout=300)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture(scope="session")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel, and with this one's packages but for the project itself: a path in a .pth
    file is searched for modules, but its own .pth files, of which one is the editable install, are not read."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    (packages,) = folder.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    ray = folder / "bin" / "ray"  # the command of the package that the .pth file brings
    ray.write_text(f"#!{python}\nfrom ray.scripts.scripts import main\n\nmain()\n")
    ray.chmod(0o755)
    return folder


@pytest.fixture(scope="session")
def inception_state() -> dict:
    """Random weights under pytorch-fid's names (its layers differ from torchvision's in what they do, not in what they
    hold), as old as its file: without ``num_batches_tracked``. PyTorch's default initialisation would give features
    near 1e-8."""
    import torch

    models = pytest.importorskip("torchvision.models")
    network = models.inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    generator = torch.Generator().manual_seed(0)
    state = {key: value for key, value in network.state_dict().items() if not key.endswith("num_batches_tracked")}
    for key, value in state.items():
        if value.ndim == 4:
            torch.nn.init.kaiming_normal_(value, generator=generator)
        elif key.endswith("bn.bias"):
            value.normal_(0, 0.1, generator=generator)
    return state


@pytest.fixture(scope="session")
def inception_weights(inception_state: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(inception_state, path)
    return path


@pytest.fixture(scope="session")
def complete(model: Path) -> Callable[[], Bundle]:
    """The model with an untrained network for every method that needs one; loaded anew at each call."""
    import torch
    from diffusers import ControlNetModel, UNet2DModel

    from diffva_ray.model.bundle import load
    from diffva_ray.model.classifier import LatentClassifier
    from diffva_ray.model.gan_generator import GanGenerator
    from diffva_ray.references.charachon import Pair
    from diffva_ray.references.image_classifier import ImageClassifier
    from diffva_ray.references.textual_inversion import ConceptVectors

    def load_with_extras() -> Bundle:
        bundle = load(str(model))
        torch.manual_seed(0)
        bundle.extras["classifier"] = LatentClassifier(["COVID", "Normal"], "Normal", 4, (8, 16), 4)
        controlnet = ControlNetModel.from_unet(bundle.unet, conditioning_embedding_out_channels=(8, 16, 16))
        controlnet.register_to_config(conditions=["lungs", "edges"])
        for parameter in controlnet.parameters():  # its last layers are zero before it is trained
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
        bundle.extras["controlnet"] = controlnet.eval()
        for name in ("va_gan", "vant_gan", "ant_gan"):
            bundle.extras[name] = GanGenerator("image" if name == "ant_gan" else "map", (8, 16), 4)
        bundle.extras["healthy_unet"] = UNet2DModel(
            8, 4, 4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )  # fmt: skip
        bundle.extras["healthy_unet"].register_to_config(noise_octaves=1)
        bundle.extras["textual_inversion"] = ConceptVectors(["COVID", "Normal"], 64)
        bundle.extras["image_classifier"] = ImageClassifier(["COVID", "Normal"], "Normal")
        bundle.extras["singla"] = GanGenerator("image", (8, 16), 4, in_channels=2)
        bundle.extras["charachon"] = Pair((8, 16), 4)
        assert {method.needs for method in METHODS.values() if method.needs} <= set(bundle.extras)
        return bundle

    return load_with_extras
