"""Every mistake of the catalogue is provoked, and answered: what was given, what is wrong, what would do.

In this process, as the imports of some programs take seconds; what is called is what the command line calls.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import shlex
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from crate_dist.data.remote import fetch
from tests.errors.places import Places
from tests.errors.program import CIRCUMSTANCES, as_nobody, call, load
from tests.ranks import REPOSITORY

CATALOGUE = Path(__file__).with_name("catalogue.txt")
LONGEST = 700
"""Characters of a paragraph that somebody still reads."""


class Mistake(NamedTuple):
    """A command line with a mistake, the end of what stderr says, and the exit status."""

    name: str
    typed: str
    said: str
    status: int


def catalogue() -> Iterator[Mistake]:
    """Reads the catalogue: of each mistake its name, `$` and what is typed, and the answer."""
    for name, typed, said in re.findall(r"^(\S.*)\n\$ (.*)\n((?:.+\n)+)", CATALOGUE.read_text(encoding="utf-8"), re.M):
        answer, _, status = said.strip().partition("\nexit status ")
        yield Mistake(name, typed, answer, int(status or (2 if answer.endswith("--help lists all options") else 1)))


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> Iterator[Places]:
    """A folder for one mistake, which every user of this machine may write to."""
    handlers = logging.getLogger().handlers[:]
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o777)
        monkeypatch.chdir(folder)
        monkeypatch.setenv("HOME", folder)  # where nobody has said what their cluster is like
        monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
        places = Places(Path(folder))
        yield places
        places.close()
        monkeypatch.undo()
    logging.getLogger().handlers[:] = handlers


@pytest.mark.parametrize("mistake", [pytest.param(one, id=one.name) for one in catalogue()])
def test_a_mistake_is_answered(
    mistake: Mistake, places: Places, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "RETRIES", dataclasses.replace(fetch.RETRIES, attempts=1))
    words, around = shlex.split(mistake.typed.format_map(places)), CIRCUMSTANCES["as_usual"]
    if words[0] in CIRCUMSTANCES:
        around = CIRCUMSTANCES[words.pop(0)]
    if around is as_nobody and not REPOSITORY.stat().st_mode & 0o005:
        pytest.skip("nobody else may look into this clone")
    while "=" in words[0]:
        monkeypatch.setenv(*words.pop(0).split("=", 1))
    load(words[0])
    expected = mistake.said.format_map(places)
    with around():
        status = call(words[0], words[1:])
    stderr = capsys.readouterr().err
    assert (status, "Traceback" in stderr) == (mistake.status, False), stderr
    said = stderr[stderr.index("error: ") :].strip()
    assert re.fullmatch(re.escape(expected).replace("…", ".*"), said), said
    assert "\n\n" not in said, "more than one paragraph"
    assert len(said) < LONGEST


def test_the_catalogue_is_one_of_many_mistakes() -> None:
    names = [mistake.name for mistake in catalogue()]
    assert len(names) == len(set(names)) > 100
