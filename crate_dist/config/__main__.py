"""Writes every setting of a recipe as Markdown, from the sections themselves.

python -m crate_dist.config                      prints it
python -m crate_dist.config docs/training.md     puts it between the two marks of that page
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from crate_dist.config.recipe import Recipe
from crate_dist.files import write_whole

BEGIN, END = "<!-- settings: generated -->", "<!-- settings: end -->"
_TYPES = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
_BOUNDS = {"exclusiveMinimum": "above", "minimum": "from", "maximum": "to", "exclusiveMaximum": "below"}


def settings() -> str:
    """Returns a table for each section: key, type, default and meaning of its settings."""
    return "\n".join(_lines())


def put_into(page: str) -> str:
    """Returns the page with today's tables between its marks. Raises ValueError where it has none."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"no {BEGIN} … {END} in the page")
    return f"{before}{BEGIN}\n\n{settings()}\n{END}{after}"


def _lines() -> Iterator[str]:
    schema = Recipe.model_json_schema()
    for name, place in schema["properties"].items():
        if "$ref" not in place:  # the run's name, which is in no section
            continue
        section = schema["$defs"][place["$ref"].rpartition("/")[2]]
        yield from (f"**[{name}]** {section['description']}", "")
        yield from ("| key | type | default | meaning |", "|---|---|---|---|")
        for key, setting in section["properties"].items():
            default = "required" if key in section.get("required", ()) else _code(setting["default"])
            yield f"| `{name}.{key}` | {_type(setting)} | {default} | {setting['description']} |"
        yield ""


def _type(setting: Mapping[str, Any]) -> str:
    if "anyOf" in setting:
        kinds = (_type(kind) for kind in setting["anyOf"] if kind["type"] != "null")
        return " or ".join(dict.fromkeys(kinds))
    if choices := setting.get("enum") or ("const" in setting and [setting["const"]]):
        return " or ".join(map(_code, choices))
    if setting["type"] == "array":
        kind, _, within = _type(setting.get("items") or setting["prefixItems"][0]).partition(" ")
        return f"{setting.get('maxItems', 'any number of')} {kind}s {within}".rstrip()
    if setting.get("format") == "path":
        return "path"
    bounds = (f"{word} {setting[key]:g}" for key, word in _BOUNDS.items() if key in setting)
    return " ".join([_TYPES[setting["type"]], *bounds])


def _code(value: Any) -> str:
    return "unset" if value is None else f"`{json.dumps(value)}`"


def main() -> None:
    """Prints the tables, or puts them into a page."""
    parser = argparse.ArgumentParser(prog="python -m crate_dist.config", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("page", nargs="?", type=Path, metavar="PAGE", help="file with the two marks")
    page = parser.parse_args().page
    try:
        if page:
            write_whole(page, put_into(page.read_text(encoding="utf-8")))
        else:
            sys.stdout.write(settings() + "\n")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
