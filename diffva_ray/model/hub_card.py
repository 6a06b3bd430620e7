"""``README.md`` of a model folder: what a hub shows of it, from ``diffva.json`` and the judge's card."""

from __future__ import annotations

from typing import Any

import yaml

from diffva_ray.model.card import judge_card, read_card
from diffva_ray.storage.store import Store

README = "README.md"
CITATION = """@article{siddiqui2025latent,
  title   = {A latent diffusion approach to visual attribution in medical imaging},
  author  = {Siddiqui, Ammar Adeel and Tirunagari, Santosh and Zia, Tehseen and Windridge, David},
  journal = {Scientific Reports}, volume = {15}, pages = {962}, year = {2025},
  doi     = {10.1038/s41598-024-81646-x}
}"""
TEXT = """# Counterfactuals of chest X-rays: {recipe}

A latent diffusion model that generates counterfactuals of chest X-rays from prompts, trained with diffva-ray on
{images} images ({data}). Attribution maps are the difference of an image and its healthy counterfactual.

> **Not for clinical use.** Counterfactuals are **synthetic images**, not what a patient would look like; an attribution
> map shows what the model changes.

## Use

```
diffva explain IMAGE --model DIR
diffva generate --data DATA --model DIR --out RUN
```

The folder is a diffusers pipeline: `diffusers.DiffusionPipeline.from_pretrained("DIR")` loads it, too.

## How it was made

{table}

Prompts of the classes:

{prompts}

`diffva.json` has the whole recipe, the folder of the training images and their hashes, by which diffva-ray refuses to
evaluate the model on them.

## Judge

{judge}

## Limits

- Trained on the images above alone: other sites, devices, ages and views were not tested.
- Nothing says that a change is the disease; compare attribution maps with radiologists' outlines.
- Terms of the training images and of the base model may apply to the weights. Check them before you publish.

## Citation

```bibtex
{citation}
```
"""


def write_hub_card(store: Store) -> bool:
    """Write the card of a trained model unless there is one, which may have been edited; returns whether it was.

    Raises UnusableModel for a damaged ``diffva.json``, StoreError."""
    card = read_card(store)
    return card is not None and store.put_if_absent(README, hub_card(card, judge_card(store)).encode())


def hub_card(card: dict[str, Any], judge: dict[str, Any] | None) -> str:
    """The text of the card. No path of the machine is in it."""
    recipe, phantoms = card["recipe"], card.get("data_kind") == "phantoms"
    base = str((recipe.get("model") or {}).get("base") or "")
    header = {
        "library_name": "diffusers",
        "pipeline_tag": "image-to-image",
        "license": "apache-2.0" if phantoms and not base else "other",
        "tags": ["medical", "chest-x-ray", "counterfactual-explanation", "attribution", "diffva-ray"],
        # a name on the hub, never a folder of this machine
        **({"base_model": base} if base.count("/") == 1 and not base.startswith((".", "/", "~")) else {}),
    }
    rows = {
        "recipe": recipe["name"],
        "resolution": f"{(recipe.get('model') or {}).get('resolution', '')} px",
        "training images": str(card.get("images", "")),
        "digest of the weights": f"`{card['digest']}`",
        "software": f"diffva-ray {card.get('diffva_ray', '')} ({card.get('code_revision', '')})",
        "started": str(card.get("started", "")).partition("T")[0],
    }
    prompts = (recipe.get("data") or {}).get("prompts") or {}
    text = TEXT.format(
        recipe=recipe["name"],
        images=card.get("images", "some"),
        data="synthetic phantoms, drawings and no patients" if phantoms else _plain(card.get("data_kind", "")),
        table=_table(("", ""), rows),
        prompts=_table(("class", "prompt"), prompts),
        judge=_judge(judge),
        citation=CITATION,
    )
    return f"---\n{yaml.safe_dump(header, sort_keys=False)}---\n\n{text}"


def _judge(judge: dict[str, Any] | None) -> str:
    """How good the model's own classifier is, which measures flip rates."""
    if judge is None:
        return "The model has none; flip rates need another classifier (`diffva reduce --judge`)."
    tested = judge.get("calibration") or {}
    accuracy, n = tested.get("accuracy"), tested.get("n") or tested.get("images")
    if not isinstance(accuracy, int | float):
        return "`judge/` is a classifier that measures flip rates. It was not tested: its flip rates are no evidence."
    of = f" on {n} held-out images" if n else " on held-out images"
    return f"`judge/` is a classifier that measures flip rates and guides nothing. Its accuracy{of}: {accuracy:.3f}."


def _table(heads: tuple[str, str], rows: dict[str, Any]) -> str:
    lines = [heads, ("---", "---"), *((_plain(key), _plain(value)) for key, value in rows.items())]
    return "\n".join(f"| {first} | {second} |" for first, second in lines)


def _plain(text: Any) -> str:
    return " ".join(str(text).split()).replace("|", "\\|").replace("<", "&lt;")
