"""Entry script of ``diffva report``: ``ray job submit --working-dir . -- python jobs/report.py ...``."""

import sys

from diffva_ray.cli import main

if __name__ == "__main__":
    main(["report", *sys.argv[1:]])
