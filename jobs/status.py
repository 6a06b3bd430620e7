"""Entry script of ``diffva status``: ``ray job submit --working-dir . -- python jobs/status.py ...``."""

import sys

from diffva_ray.cli import main

if __name__ == "__main__":
    main(["status", *sys.argv[1:]])
