"""Entry script of ``diffva phantoms``: ``ray job submit --working-dir . -- python jobs/phantoms.py ...``."""

import sys

from diffva_ray.cli import main

if __name__ == "__main__":
    main(["phantoms", *sys.argv[1:]])
