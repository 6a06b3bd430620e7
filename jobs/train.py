"""Entry script of ``diffva train``: ``ray job submit --working-dir . -- python jobs/train.py ...``."""

import sys

from diffva_ray.cli import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
