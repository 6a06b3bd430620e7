"""``python -m diffva_ray VERB``: the same as ``diffva VERB``."""

from diffva_ray.cli import main

main(prog_name="diffva")
