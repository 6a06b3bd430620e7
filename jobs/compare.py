"""Entry script of ``diffva compare``: ``ray job submit --working-dir . -- python jobs/compare.py ...``."""

import sys

from diffva_ray.cli import main

if __name__ == "__main__":
    main(["compare", *sys.argv[1:]])
