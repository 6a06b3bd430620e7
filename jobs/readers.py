"""Entry script of ``diffva readers``: ``ray job submit --working-dir . -- python jobs/readers.py ...``."""

import sys

from diffva_ray.cli import main

if __name__ == "__main__":
    main(["readers", *sys.argv[1:]])
