"""One gloo worker of a training, as a process of its own: python workers.py RANK WORLD PORT RECIPE.json IMAGES OUT."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main(rank: str, world: str, port: str, recipe: str, images: str, out: str) -> None:
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world,
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    if world == "1":
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
            del os.environ[name]
    from diffva_ray.config.recipe import make_recipe
    from diffva_ray.train.checkpoint import Checkpoints
    from diffva_ray.train.loop import train

    keep = Checkpoints(Path(out) / ".train", 2)
    resume = keep.latest()
    train(
        make_recipe(json.loads(Path(recipe).read_text())),
        images,
        out,
        fingerprint="x",
        provenance={},
        report=keep,
        resume=resume,
        threads=1,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
