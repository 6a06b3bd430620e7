"""Writes docs/reference from the code: every key of a recipe, every column of the records, the help of every command.

python docs/write_reference.py            # after a change of either
python docs/write_reference.py --check    # exit 1 and the pages that say something else (a test does this)
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
from diffva_ray.schema import COLUMNS, Status

FOLDER = Path(__file__).parent / "reference"
WIDTH = 100
Schema = dict[str, Any]

RECIPES = """# Keys of a recipe

Written by `docs/write_reference.py` from the code (`diffva_ray/config*.py`).

A recipe is a YAML file with the sections below; `--recipe NAME` takes one of those that come with the package,
`--recipe FILE.yaml` your own. `--set KEY=VALUE` overrides one value, as in `--set generate.masked.quantile=0.9` or
`--set train.stages.1.steps=500`, and `--dry-run` prints the whole. *required*: no default. *none*: the default is to
have none; write `null`.
"""
COMMANDS = """# Commands

Written by `docs/write_reference.py` from the code (`diffva_ray/commands/`). `python jobs/VERB.py` takes the options of
`diffva VERB`, for all verbs but demo and inspect.
"""
HEAD = """# Columns of the records

Written by `docs/write_reference.py` from the code (`diffva_ray/schema.py`). One row for every planned record, in
`records/part-*.parquet`, whatever became of it.
"""
STATUSES = ", ".join(f"`{status.value}`" for status in Status)


def recipes_page() -> str:
    schema = Recipe.model_json_schema()
    return "\n".join([RECIPES, *(section(*part) for part in parts(schema, schema, ""))])


def parts(schema: Schema, part: Schema, path: str) -> Iterator[tuple[str, Schema, Schema]]:
    """Heading, schema and fields of a section of the recipe, and of all sections in it."""
    for field in part["properties"].values():
        if name := reference(field):  # the schema leaves out a description that is the section's own
            field.setdefault("description", schema["$defs"][name]["description"])
    yield f"`{path}`" if path else "The top", part, part["properties"]
    for key, field in part["properties"].items():
        below = f"{path}.{key}".lstrip(".")
        if name := reference(field):
            yield from parts(schema, schema["$defs"][name], below)
        elif "discriminator" in field.get("items", {}):
            yield from stages(schema, field["items"]["discriminator"]["mapping"], below)


def stages(schema: Schema, kinds: dict[str, str], path: str) -> Iterator[tuple[str, Schema, Schema]]:
    """The keys that all stages have, then those that a kind has by itself or with another default."""
    general = StageConfig.model_json_schema()
    yield f"`{path}.N`", general, general["properties"]
    for kind, name in kinds.items():
        part = schema["$defs"][name.rpartition("/")[2]]
        shared = general["properties"]
        own = {key: field for key, field in part["properties"].items() if field != shared.get(key) and key != "trains"}
        yield f"`{path}.N` with `trains: {kind}`", part, own


def reference(field: Schema) -> str:
    """Name of the section that a field holds; empty for a plain value."""
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
    """A docstring in one line of Markdown."""
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
    """The values that are allowed: names, or an interval."""
    if "anyOf" in field:
        return limits(next(option for option in field["anyOf"] if option.get("type") != "null"))
    if "items" in field and "enum" in field["items"]:
        return limits(field["items"])
    if "enum" in field:
        return ", ".join(f"`{value}`" for value in field["enum"])
    signs = {"exclusiveMinimum": "> {}", "minimum": "≥ {}", "exclusiveMaximum": "< {}", "maximum": "≤ {}"}
    said = [sign.format(f"{field[name]:g}") for name, sign in signs.items() if name in field]
    said += [f"multiple of {field['multipleOf']:g}"] if "multipleOf" in field else []
    return ", ".join(said)


def commands_page() -> str:
    parent = click.Context(main, info_name="diffva", terminal_width=WIDTH, **main.context_settings)
    contexts = [parent] + [click.Context(main.commands[verb], parent, verb) for verb in sorted(main.commands)]
    blocks = [f"## {context.command_path}\n\n```\n{context.get_help()}\n```\n" for context in contexts]
    return "\n".join([COMMANDS, *blocks])


def columns_page() -> str:
    rows = "".join(f"| `{name}` | {kind} | {meaning} |\n" for name, kind, meaning in COLUMNS)
    return f"{HEAD}\n| column | type | meaning |\n| --- | --- | --- |\n{rows}\n`status` is one of {STATUSES}.\n"


PAGES = {"recipes.md": recipes_page, "commands.md": commands_page, "columns.md": columns_page}


def stale() -> list[str]:
    """Names of the pages that do not say what the code says."""
    return [
        name
        for name, page in PAGES.items()
        if not (FOLDER / name).is_file() or (FOLDER / name).read_text(encoding="utf-8") != page()
    ]


@click.command()
@click.option("--check", is_flag=True, help="Write nothing; exit 1 where a page is stale.")
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
