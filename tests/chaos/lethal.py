"""Setup of the Ray workers of the poison test: some images end the process that reads them."""

from __future__ import annotations

import os
import signal


def prepare_worker() -> None:
    from diffva_ray.generate import shard

    segfault, exit_at_once = os.environ["DEADLY_IMAGES"].split(":")
    read = shard.read_source

    def reading(context, row):
        if row["image_path"] == segfault:
            os.kill(os.getpid(), signal.SIGSEGV)
        if row["image_path"] == exit_at_once:
            os._exit(3)
        return read(context, row)

    shard.read_source = reading
