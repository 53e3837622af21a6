"""The run that nobody disturbs."""

from __future__ import annotations

import time
from pathlib import Path

from tests.chaos.trial import Trial
from tests.conftest import SMALL_RECIPE, casts, write_split


def undisturbed(folder: Path) -> tuple[Trial, float]:
    """Shards, a recipe, and a run of it; how long it took, once everything was imported."""
    shards = folder / "shards"
    write_split(shards / "train", casts(200, seed=1), shard_samples=60, classes=4)
    write_split(shards / "val", casts(37, seed=2), shard_samples=20, classes=4)
    recipe = folder / "small.toml"
    recipe.write_text(SMALL_RECIPE)
    arguments = ["--config", recipe, "--data", shards]
    Trial(folder / "first", [*arguments, "--set", "train.max_steps=1"]).finish()
    reference = Trial(folder / "undisturbed", arguments)
    began = time.monotonic()
    reference.finish()
    takes_s = time.monotonic() - began
    reference.check()
    return reference, takes_s
