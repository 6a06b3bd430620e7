"""Entry script of ``diffva explain``: ``ray job submit --working-dir . -- python jobs/explain.py ...``."""

import sys

from diffva_ray.cli import main

if __name__ == "__main__":
    main(["explain", *sys.argv[1:]])
