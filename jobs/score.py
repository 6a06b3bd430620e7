"""Entry script of ``diffva score``: ``ray job submit --working-dir . -- python jobs/score.py ...``."""

import sys

from diffva_ray.cli import main

if __name__ == "__main__":
    main(["score", *sys.argv[1:]])
