"""Real runs without SLURM are stopped, by the request alone and by a signal, and go on when a person says so."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from crate_dist.run.checkpoints import checkpoint_names
from crate_dist.run.exit_status import STOPPED
from crate_dist.run.folder import RunFolder
from tests.cluster.testbed import wait_until
from tests.ranks import REPOSITORY, Training


def status(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """launch/status.py."""
    command = [sys.executable, REPOSITORY / "launch" / "status.py", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def told(run_dir: Path) -> dict[str, Any]:
    """What it says as JSON."""
    said: dict[str, Any] = json.loads(status(run_dir, "--json").stdout)
    return said


def has_step(folder: RunFolder, step: int) -> bool:
    """Tells whether the run has reported a step."""
    return folder.metrics.exists() and f'{{"step": {step},' in folder.metrics.read_text()


@pytest.mark.spawn
def test_a_run_stops_by_the_request_alone_and_by_a_signal_and_goes_on(
    small_recipe: Path, cast_shards: Path, tmp_path: Path
) -> None:
    folder, note = RunFolder(tmp_path / "run"), tmp_path / "note"
    arguments: list[str | Path] = ["--config", small_recipe, "--data", cast_shards, "--run-dir", folder.path]
    arguments += ["--set", "train.epochs=300", "--set", "log.eval_every_epochs=300"]
    with Training(arguments, 2) as training:  # as on machines out of reach of a signal
        wait_until(lambda: has_step(folder, 3), "step 3")
        folder.stop_request.write_text("{}")
        assert training.wait() == [STOPPED, STOPPED], training.output()
    first = told(folder.path)
    assert (first["state"], first["stop_requested"]) == ("stopped", True)
    assert checkpoint_names(folder.checkpoints)[-1] == f"step-{first['step']:08d}"

    launcher: list[str | Path] = [
        sys.executable,
        REPOSITORY / "launch" / "status.py",
        "resume",
        folder.path,
        "--notify",
        f"touch {note}",
    ]
    with subprocess.Popen(launcher, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            wait_until(lambda: has_step(folder, first["step"] + 3), "steps of the second start")
            assert not folder.stop_request.exists()
            running = told(folder.path)
            assert (running["state"], running["restarts"], running["world_size"]) == ("running", 1, 2)
            stopped = status("stop", folder.path, "--wait")
            assert process.wait(60) == STOPPED
        finally:
            process.terminate()
        assert process.stdout
        assert "stopped, as it was asked to; the same command goes on" in process.stdout.read()
    second = told(folder.path)
    assert "is told to save and to end" in stopped.stdout
    assert f"stopped: it was asked to stop, and has saved step {second['checkpoint_step']}" in stopped.stdout
    assert second["checkpoint_step"] == second["step"] > first["step"]
    assert not note.exists()  # it was nothing to tell
    assert "nothing to stop: it is stopped" in status("stop", folder.path).stdout
    logs = status("logs", folder.path, "--rank", "1", "--lines", "5").stdout
    assert logs.startswith(f"{folder.path}: STOPPED: it was asked to stop")
    assert f"told to stop: saving step {second['step']}" in logs


def test_a_log_is_followed_through_a_new_file(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.logs.mkdir(parents=True)
    folder.recipe_file.write_text('name = "run"\n')
    log = folder.log_file(1)
    log.write_text("first\nhal")
    command: list[str | Path] = [
        sys.executable,
        "-u",
        REPOSITORY / "launch" / "status.py",
        "logs",
        folder.path,
        "--rank",
        "1",
        "--follow",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            assert [process.stdout.readline() for _ in range(3)][1:] == [f"==> {log} <==\n", "first\n"]
            with log.open("a") as file:
                file.write("f\nsecond\n")
            assert [process.stdout.readline() for _ in range(2)] == ["half\n", "second\n"]
            log.write_text("new\n")
            assert process.stdout.readline() == "new\n"
        finally:
            process.kill()


def test_what_a_recipe_does_not_keep_is_said_when_a_run_is_resumed(
    small_recipe: Path, cast_shards: Path, tmp_path: Path
) -> None:
    launch: list[str | Path] = [
        sys.executable,
        REPOSITORY / "launch" / "slurm.py",
        "--config",
        small_recipe,
        "--run-dir",
        tmp_path / "run",
    ]
    shown = subprocess.run(
        [*launch, "--data", cast_shards, "--dry-run", "--setup", "module load cuda", "--gpus-per-node", "0"],
        capture_output=True,
        text=True,
    ).stdout
    folder = RunFolder(tmp_path / "run")
    (folder.slurm / "12").mkdir(parents=True)
    folder.recipe_file.write_text(shown.partition("recipe.toml ")[2].partition("\n")[2])
    resumed = status("resume", folder.path, "--dry-run", "--nodes", "3")
    assert resumed.returncode == 0, resumed.stderr
    assert "note: cluster.setup is not kept: --setup, or a site file, gives it at each start." in resumed.stderr
    assert "#SBATCH --nodes=3" in resumed.stdout
    assert "note" not in status("resume", folder.path, "--dry-run", "--setup", "module load cuda").stderr
