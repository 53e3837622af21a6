"""The names of a run's checkpoints, and the note outside their folder that there are some. Imports no torch."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crate_dist.files import write_whole

PREFIX = "step-"
UNFINISHED = ".unfinished-"
"""Begins the name of what is being written or removed."""

_NAME = re.compile(PREFIX + r"(\d{8,})(?:\.(\d+))?")


def step_name(step: int, replacement: int = 0) -> str:
    """Returns the name of a checkpoint's folder; `replacement` counts those of the same step."""
    return f"{PREFIX}{step:08d}" + (f".{replacement}" if replacement else "")


def checkpoint_names(folder: Path) -> list[str]:
    """Lists the names of the checkpoints in a folder, the newest last; none where there is no folder.

    One that replaces another of the same step has a number behind it: step-00000015.1 is newer than step-00000015.

    Raises OSError when the folder cannot be listed.
    """
    try:
        found = [match for name in os.listdir(folder) if (match := _NAME.fullmatch(name))]
    except FileNotFoundError:
        return []
    return [match[0] for match in sorted(found, key=lambda match: (int(match[1]), int(match[2] or 0)))]


def judged_top1(values: Mapping[str, Any]) -> float:
    """Returns the top-1 by which the best checkpoint is told, of an evaluation by the names of metrics.jsonl.

    It is that of the average of the weights where there is one; -1 where there was no evaluation.
    """
    return float(values.get("val/ema_top1", values.get("val/top1", -1.0)))


def newest_step(folder: Path) -> int:
    """Returns the step of the newest checkpoint in a folder by its name, -1 where there is none. Raises OSError."""
    names = checkpoint_names(folder)
    return int(names[-1].removeprefix(PREFIX).partition(".")[0]) if names else -1


def unfinished_name(number: int, token: str, name: str) -> str:
    """Returns what is being written or removed by a holder of the run folder is called; number, token: his tenure's."""
    return f"{UNFINISHED}{number}-{token}-{name}"


def published_file(checkpoints: Path) -> Path:
    """Returns where the newest step that was ever published stands: beside the folder of the checkpoints."""
    return checkpoints.with_name("published.json")


def note_published(checkpoints: Path, step: int) -> None:
    """Puts down that there is a checkpoint of this step, so that one that is gone is missed. Raises OSError."""
    write_whole(published_file(checkpoints), json.dumps({"step": step}) + "\n")


def published_step(checkpoints: Path) -> int | None:
    """Reads what note_published has put down; None for nothing.

    Raises ValueError when the note is damaged, OSError when it cannot be read.
    """
    try:
        return int(json.loads(published_file(checkpoints).read_text(encoding="utf-8"))["step"])
    except FileNotFoundError:
        return None
    except (KeyError, TypeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
