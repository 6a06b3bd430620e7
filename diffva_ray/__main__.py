"""Run ``diffva VERB`` as ``python -m diffva_ray VERB``."""

from diffva_ray.cli import main

main(prog_name="diffva")
