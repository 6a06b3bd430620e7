"""Entry script of ``diffva retry``: ``ray job submit --working-dir . -- python jobs/retry.py ...``."""

import sys

from diffva_ray.cli import main

if __name__ == "__main__":
    main(["retry", *sys.argv[1:]])
