"""What a Ray worker of the poison test does before its first task: it learns which films take their process down."""

from __future__ import annotations

import os
import signal


def prepare_worker() -> None:
    from diffva_ray.generate import shard

    segfault, leave_at_once = os.environ["DEADLY_FILMS"].split(":")
    read = shard.read_source

    def reading(bench, row):
        if row["source_path"] == segfault:
            os.kill(os.getpid(), signal.SIGSEGV)
        if row["source_path"] == leave_at_once:
            os._exit(3)
        return read(bench, row)

    shard.read_source = reading
