"""Entry script of ``diffva paper``: ``ray job submit --working-dir . -- python jobs/paper.py ...``."""

import sys

from diffva_ray.cli import main

if __name__ == "__main__":
    main(["paper", *sys.argv[1:]])
