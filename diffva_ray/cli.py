"""``diffva VERB``: one command per verb. The scripts in jobs/ are the same commands, for ``ray job submit``."""

from diffva_ray.commands import data, model, numbers, paper, run  # each registers its verbs
from diffva_ray.commands.verb import main

__all__ = ["data", "main", "model", "numbers", "paper", "run"]

if __name__ == "__main__":
    main()
