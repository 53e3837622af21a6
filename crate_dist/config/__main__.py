"""Writes every setting of a recipe as Markdown, from the sections themselves.

python -m crate_dist.config                      prints it
python -m crate_dist.config docs/training.md     puts it between the two marks of that page
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from crate_dist.arguments import Parser
from crate_dist.config.settings import sections
from crate_dist.files import write_whole

BEGIN, END = "<!-- settings: generated -->", "<!-- settings: end -->"


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
    for name, (purpose, listed) in sections().items():
        yield from (f"**[{name}]** {purpose}", "")
        yield from ("| key | type | default | meaning |", "|---|---|---|---|")
        for setting in listed:
            default = setting.default if setting.default in ("required", "unset") else f"`{setting.default}`"
            yield f"| `{setting.key}` | {_code_in(setting.kind)} | {default} | {setting.meaning} |"
        yield ""


def _code_in(kind: str) -> str:
    """Marks the words of a choice between values as code."""
    return re.sub(r'"[^"]*"', r"`\g<0>`", kind)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints the tables, or puts them into a page."""
    parser = Parser(prog="python -m crate_dist.config", description=__doc__)
    parser.add_argument("page", nargs="?", type=Path, metavar="PAGE", help="file with the two marks")
    page = parser.parse_args(arguments).page
    try:
        if page:
            write_whole(page, put_into(page.read_text(encoding="utf-8")))
        else:
            sys.stdout.write(settings() + "\n")
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
