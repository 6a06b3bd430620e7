"""The command line ``diffva VERB``. The scripts in jobs/ run the same verbs, for ``ray job submit``."""

# importing a module registers its verbs
from diffva_ray.commands import data, export, model, numbers, paper, run, studio
from diffva_ray.commands.verb import main

__all__ = ["data", "export", "main", "model", "numbers", "paper", "run", "studio"]

if __name__ == "__main__":
    main()
