"""Write docs/reference from the code: recipe keys, record columns and the help of every command.

python docs/write_reference.py            # after a change of recipes, columns or help
python docs/write_reference.py --check    # exit 1 and list the stale pages
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from diffva_ray.cli import main
from diffva_ray.config.recipe import Recipe
from diffva_ray.config.stages import StageConfig
from diffva_ray.schema import MEANINGS, RECORDS, Status

FOLDER = Path(__file__).parent / "reference"
WIDTH = 100
Schema = dict[str, Any]

RECIPES_HEAD = """# Keys of a recipe

Written by `docs/write_reference.py` from the code (`diffva_ray/config/`).

A recipe is a YAML file with the sections below. `--recipe NAME` selects a shipped recipe, `--recipe FILE.yaml` your
own. `--set KEY=VALUE` overrides one value, as in `--set generate.masked.quantile=0.9` or
`--set train.stages.1.steps=500`. `--dry-run | cat` prints the resolved recipe. *required*: the key has no default.
*none*: the default is no value, in YAML `null`.
"""
COMMANDS_HEAD = """# Commands

Written by `docs/write_reference.py` from the code (`diffva_ray/commands/`). `python jobs/VERB.py` takes the options of
`diffva VERB` for all verbs except demo, inspect and studio.
"""
COLUMNS_HEAD = """# Columns of the records

Written by `docs/write_reference.py` from the code (`diffva_ray/schema.py`). `records/part-*.parquet` has one
row for every planned record, also for quarantined ones.
"""
STATUSES = ", ".join(f"`{status.value}`" for status in Status)


def recipes_page() -> str:
    schema = Recipe.model_json_schema()
    return "\n".join([RECIPES_HEAD, *(section(*part) for part in parts(schema, schema, ""))])


def parts(schema: Schema, part: Schema, path: str) -> Iterator[tuple[str, Schema, Schema]]:
    """Yield heading, schema and fields of a section of the recipe and of its subsections."""
    for field in part["properties"].values():
        if name := reference(field):  # pydantic omits a description that equals the section's
            field.setdefault("description", schema["$defs"][name]["description"])
    yield f"`{path}`" if path else "The top", part, part["properties"]
    for key, field in part["properties"].items():
        below = f"{path}.{key}".lstrip(".")
        if name := reference(field):
            yield from parts(schema, schema["$defs"][name], below)
        elif "discriminator" in field.get("items", {}):
            yield from stages(schema, field["items"]["discriminator"]["mapping"], below)


def stages(schema: Schema, kinds: dict[str, str], path: str) -> Iterator[tuple[str, Schema, Schema]]:
    """Yield the keys of all stages, then, by kind, its own keys and those with another default."""
    general = StageConfig.model_json_schema()
    yield f"`{path}.N`", general, general["properties"]
    for kind, name in kinds.items():
        part = schema["$defs"][name.rpartition("/")[2]]
        shared = general["properties"]
        own = {key: field for key, field in part["properties"].items() if field != shared.get(key) and key != "trains"}
        yield f"`{path}.N` with `trains: {kind}`", part, own


def reference(field: Schema) -> str:
    """Return the name of the section that a field holds; empty for a plain value."""
    options = [field, *field.get("anyOf", ())]
    return next((option["$ref"].rpartition("/")[2] for option in options if "$ref" in option), "")


def section(heading: str, part: Schema, fields: dict[str, Schema]) -> str:
    text = f"## {heading}\n\n{prose(part['description'])}\n"
    if not fields:
        return text
    required = part.get("required", ())
    rows = [
        (f"`{key}`", kind(field), default(field, key in required), limits(field), prose(field["description"]))
        for key, field in fields.items()
    ]
    table = [("key", "type", "default", "range", "meaning"), ("---",) * 5, *rows]
    return text + "\n" + "".join("| " + " | ".join(cells) + " |\n" for cells in table)


def prose(text: str) -> str:
    """Convert a docstring to one line of Markdown."""
    return re.sub(r"``(.+?)``", r"`\1`", " ".join(text.split())).replace("|", "\\|")


def kind(field: Schema) -> str:
    if "anyOf" in field:
        return kind(next(option for option in field["anyOf"] if option.get("type") != "null"))
    if reference(field):
        return "section"
    if "prefixItems" in field:
        return f"{len(field['prefixItems'])} {kind(field['prefixItems'][0])}s"
    if "items" in field:
        items = field["items"]
        return "list of stages" if "discriminator" in items else f"list of {kind(items)}s"
    if field["type"] == "object":
        values = field["additionalProperties"]
        return "mapping" if values is True else f"mapping to {kind(values)}s"
    return {"boolean": "true or false", "string": "text"}.get(field["type"], field["type"])


def default(field: Schema, required: bool) -> str:
    if required:
        return "*required*"
    if reference(field) and field.get("default") is not None:
        return "below"
    value = field["default"]
    if value is None:
        return "*none*"
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def limits(field: Schema) -> str:
    """Format the allowed values: names, or an interval."""
    if "anyOf" in field:
        return limits(next(option for option in field["anyOf"] if option.get("type") != "null"))
    if "items" in field and "enum" in field["items"]:
        return limits(field["items"])
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    signs = {"exclusiveMinimum": "> {}", "minimum": "≥ {}", "exclusiveMaximum": "< {}", "maximum": "≤ {}"}
    bounds = [sign.format(f"{field[name]:g}") for name, sign in signs.items() if name in field]
    bounds += [f"multiple of {field['multipleOf']:g}"] if "multipleOf" in field else []
    return ", ".join(bounds)


def commands_page() -> str:
    parent = click.Context(main, info_name="diffva", terminal_width=WIDTH, **main.context_settings)
    contexts = [parent] + [click.Context(main.commands[verb], parent, verb) for verb in sorted(main.commands)]
    blocks = [f"## {context.command_path}\n\n```\n{context.get_help()}\n```\n" for context in contexts]
    return "\n".join([COMMANDS_HEAD, *blocks])


def columns_page() -> str:
    rows = "".join(f"| `{name}` | {RECORDS.field(name).type} | {meaning} |\n" for name, meaning in MEANINGS.items())
    return f"{COLUMNS_HEAD}\n| column | type | meaning |\n| --- | --- | --- |\n{rows}\n`status` is one of {STATUSES}.\n"


PAGES = {"recipes.md": recipes_page, "commands.md": commands_page, "columns.md": columns_page}


def stale() -> list[str]:
    """Return the names of the pages that differ from the code."""
    return [
        name
        for name, page in PAGES.items()
        if not (FOLDER / name).is_file() or (FOLDER / name).read_text(encoding="utf-8") != page()
    ]


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; exit 1 if a page is stale.")
def run(check: bool) -> None:
    """Write docs/reference."""
    names = stale()
    if check:
        for name in names:
            click.echo(f"docs/reference/{name} is stale; run python docs/write_reference.py", err=True)
        raise SystemExit(1 if names else 0)
    FOLDER.mkdir(exist_ok=True)
    for name in names:
        (FOLDER / name).write_text(PAGES[name](), encoding="utf-8")
        click.echo(f"docs/reference/{name} written")


if __name__ == "__main__":
    run()
