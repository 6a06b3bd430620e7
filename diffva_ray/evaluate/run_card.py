"""``README.md`` of a run: the header with which ``datasets.load_dataset(RUN)`` reads the records, and what they are."""

from __future__ import annotations

from diffva_ray.generate.run import Run

CARD = "README.md"
TEXT = """---
tags: [diffva-ray, synthetic]
configs:
- config_name: default
  data_files: [{{split: train, path: "records/*.parquet"}}]
---

# Run {fingerprint}

Counterfactuals (**synthetic images**) and attribution maps of chest X-rays, made with diffva-ray: recipe `{recipe}`,
method `{method}`, model `{model}`. **Not for clinical use.**

`datasets.load_dataset("RUN")` and `pandas.read_parquet("RUN/records")` give the records. Their columns
`counterfactual_path`, `reconstruction_path` and `attribution_path` name images in this folder; `status` is `ok` for all
that count. Records that were generated again lie in `overlays/`. Attribution maps are 16-bit PNG files:
`(value - 32768) / 32767`.

`diffva export RUN --to huggingface --out DIR` writes a data set with the images inside, for publication.
"""


def write_card(run: Run) -> None:
    """Write the card unless there is one, which may have been edited: the card is in no manifest."""
    text = TEXT.format(
        fingerprint=run.fingerprint,
        recipe=run.recipe.name,
        method=run.keys["method"],
        model=str(run.keys["model_digest"])[:16],
    )
    run.store.put_if_absent(CARD, text.encode())
