"""Entry script of ``diffva export``: ``ray job submit --working-dir . -- python jobs/export.py ...``."""

import sys

from diffva_ray.cli import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
