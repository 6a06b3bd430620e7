"""Entry script of ``diffva generate``: ``ray job submit --working-dir . -- python jobs/generate.py ...``."""

import sys

from diffva_ray.cli import main

if __name__ == "__main__":
    main(["generate", *sys.argv[1:]])
