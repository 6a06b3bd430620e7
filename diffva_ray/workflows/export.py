"""``diffva export``: write a run as a data set, in this process or on a cluster."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from diffva_ray.export.exporting import Exported, ExportOptions, export_run
from diffva_ray.export.writing import LocalWriter, Work
from diffva_ray.generate.run import Run
from diffva_ray.workflows.execution import Executor


class _OnRay(LocalWriter):
    """Starts or joins Ray when there are several files to write: a single one is not worth it."""

    def write(self, work: Work, numbers: Sequence[int]) -> Iterable[list[str]]:
        if len(numbers) < 2:
            yield from super().write(work, numbers)
            return
        from diffva_ray.distributed import session

        with session.connect():
            from diffva_ray.distributed.export import RayWriter

            yield from RayWriter().write(work, numbers)


def export(run: Run, out: str, options: ExportOptions, executor: Executor = "ray") -> Exported:
    """Write a reduced run as a data set that others can load; see ``export_run``.

    Args:
        run: The run.
        out: The folder of the export.
        options: Format and contents.
        executor: ``ray`` spreads the files over the cluster, ``inline`` writes them in this process.

    Returns:
        What the export holds, and whether anything was written.
    """
    return export_run(run, out, options, _OnRay() if executor == "ray" else None)
