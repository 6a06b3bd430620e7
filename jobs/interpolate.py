"""Entry script of ``diffva interpolate``: ``ray job submit --working-dir . -- python jobs/interpolate.py ...``."""

import sys

from diffva_ray.cli import main

if __name__ == "__main__":
    main(["interpolate", *sys.argv[1:]])
