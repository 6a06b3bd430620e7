"""What a Ray worker of the poison test does before its first task: it learns which images take their process down."""

from __future__ import annotations

import os
import signal


def prepare_worker() -> None:
    from diffva_ray.generate import shard

    segfault, leave_at_once = os.environ["DEADLY_IMAGES"].split(":")
    read = shard.read_source

    def reading(context, row):
        if row["image_path"] == segfault:
            os.kill(os.getpid(), signal.SIGSEGV)
        if row["image_path"] == leave_at_once:
            os._exit(3)
        return read(context, row)

    shard.read_source = reading
