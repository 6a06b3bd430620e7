"""Entry script of ``diffva study``: ``ray job submit --working-dir . -- python jobs/study.py ...``."""

import sys

from diffva_ray.cli import main

if __name__ == "__main__":
    main(["study", *sys.argv[1:]])
