"""The modules of ``experiments/`` import each other by name, as a script's folder is on the path."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[3] / "experiments"))
