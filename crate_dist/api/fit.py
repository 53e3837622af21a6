"""Trains a recipe from Python, in processes of its own. Imports no torch."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from crate_dist.config import CONFIG_DIR, Recipe, RecipeError, load_recipe
from crate_dist.errors import UserError
from crate_dist.launching.options import default_run_dir
from crate_dist.launching.ranks import ending_with_parent
from crate_dist.launching.site import load_site

_LAUNCHER = CONFIG_DIR.parent / "launch" / "local.py"


class RunFailed(UserError, RuntimeError):
    """A training that did not start, or did not come to its end; the message is what it said of the reason."""


def fit(
    recipe: str | Path | Recipe,
    data: str | Path | None = None,
    *,
    run_dir: str | Path | None = None,
    settings: Mapping[str, Any] | None = None,
    ranks: int | None = None,
    init_from: str | Path | None = None,
    start_over: bool = False,
) -> Path:
    """Trains a recipe on this machine as launch/local.py does, and returns the run folder, which `load` takes.

    Called again, it goes on where the run stands, and returns at once when it is complete. What the run says is printed
    as it comes. An interrupt (Ctrl-C, or a notebook's stop button) saves, then raises KeyboardInterrupt; a second one
    ends the training at once. It ends with this process in any case.

    Parameters
    ----------
    recipe: a name in configs/, such as "crate_tiny", a recipe file, or a Recipe, such as a loaded model's
    data: folder or URL of the shards; None: the recipe's, else $CRATE_DATA. What holds a secret belongs in the latter
    run_dir: folder of the run; None: runs/NAME, as for the launchers
    settings: by flat key, as in {"optim.lr": 1e-4, "train.epochs": 5}
    ranks: processes; None: one per GPU, without a GPU one
    init_from: fine-tune: begin from a run, a checkpoint or a file of weights
    start_over: set aside what the run folder holds, and begin at step 0

    Raises
    ------
    RecipeError: no such recipe, an unknown key, a value that does not fit
    RunFailed: the training was refused, failed, or was stopped from outside
    """
    settings = settings or {}
    if empty := [key for key, value in settings.items() if value is None]:
        raise RecipeError(f"settings: {', '.join(empty)} is None; leave out what the recipe is to decide")
    overrides = [f"{key}={json.dumps(value, default=str, ensure_ascii=False)}" for key, value in settings.items()]
    with tempfile.TemporaryDirectory() as folder:
        if isinstance(recipe, Recipe):
            file = Path(folder, f"{recipe.name}.toml")
            file.write_text(recipe.to_toml(), encoding="utf-8")
            recipe = file
        resolved = load_recipe(recipe, overrides)
        run = Path(run_dir) if run_dir else default_run_dir(resolved, load_site())
        named = isinstance(recipe, str) and not recipe.endswith(".toml")
        command = [sys.executable, "-u", str(_LAUNCHER), "--arch" if named else "--config", str(recipe)]
        command += ["--run-dir", str(run), *(word for text in overrides for word in ("--set", text))]
        for option, value in (("--data", data), ("--ranks", ranks), ("--init-from", init_from)):
            command += [option, str(value)] if value is not None else []
        _follow(command + (["--start-over"] if start_over else []))
    return run


def _follow(command: list[str]) -> None:
    """Prints what a launcher says until it ends. Raises RunFailed, KeyboardInterrupt."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        process_group=0,  # a notebook's interrupt goes to the whole group: the ranks would be told twice, and not save
        preexec_fn=ending_with_parent(),
    )
    assert process.stdout is not None
    said: list[str] = []
    interrupted = False
    try:
        while True:
            try:
                for line in process.stdout:
                    print(line, end="", flush=True)  # noqa: T201
                    said = [line] if line.startswith("error: ") else said + [line] * bool(said)
                status = process.wait()
                break
            except KeyboardInterrupt:
                interrupted = True
                process.send_signal(signal.SIGINT)
    finally:
        process.kill()
        process.wait()
    if interrupted:
        raise KeyboardInterrupt
    if status:
        why = "".join(said).removeprefix("error: ").strip()
        raise RunFailed(why or f"the training ended with exit status {status}; what it said stands above")
