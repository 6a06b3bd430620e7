"""Entry script of ``diffva verify``: ``ray job submit --working-dir . -- python jobs/verify.py ...``."""

import sys

from diffva_ray.cli import main

if __name__ == "__main__":
    main(["verify", *sys.argv[1:]])
