"""--help-settings: what --set can change, told by the settings themselves."""

from __future__ import annotations

import subprocess
import sys

import pytest

from crate_dist.config.settings import as_text, sections
from tests.launching.test_launchers import LAUNCH, launch

EVERY = [setting for _, listed in sections().values() for setting in listed]


def test_every_setting_is_listed_with_kind_default_and_meaning() -> None:
    text = " ".join(as_text().split())
    for setting in EVERY:
        default = setting.default if setting.default in ("required", "unset") else f"default {setting.default}"
        assert f"{setting.key} {setting.kind}; {default} {' '.join(setting.meaning.split())}" in text


@pytest.mark.parametrize(
    ("word", "keys"),
    [
        ("warmup", {"optim.warmup_epochs", "optim.warmup_lr"}),
        ("learning-rate", {"optim.lr"}),
        ("batch_size", {"train.global_batch", "train.micro_batch"}),
        ("pixels", {"model.image_size", "model.patch_size"}),
        ("safety", {"safety.hang_timeout_s", "safety.lease_s"}),
    ],
)
def test_a_word_chooses_by_key_by_meaning_and_by_what_others_say(word: str, keys: set[str]) -> None:
    listed = {line.split()[0] for line in as_text(word).splitlines() if line.startswith("  ") and line[2] != " "}
    assert listed == keys


@pytest.mark.parametrize("program", ["slurm.py", "local.py"])
def test_a_recipe_s_own_values_are_shown_and_none_is_needed(program: str) -> None:
    assert "optim.lr    number above 0; required\n" in launch(program, "--help-settings", "optim.lr").stdout
    for named in (["--help-settings", "optim.lr", "--arch", "demo"], ["--arch", "demo", "--help-settings", "optim.lr"]):
        done = launch(program, *named)
        assert (done.returncode, done.stderr) == (0, "")
        assert "required; demo: 0.001\n" in done.stdout


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    line = f"{sys.executable} {LAUNCH / 'slurm.py'} --help-settings | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", line], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("[model]")
