"""Entry script of ``diffva reduce``: ``ray job submit --working-dir . -- python jobs/reduce.py ...``."""

import sys

from diffva_ray.cli import main

if __name__ == "__main__":
    main(["reduce", *sys.argv[1:]])
