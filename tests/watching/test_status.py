"""launch/status.py of run folders as they lie there: no job, no process, no SLURM but one that is pretended."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from crate_dist.errors import UserError
from crate_dist.run.folder import RunFolder
from crate_dist.watching.finding import find_runs
from crate_dist.watching.runs import Queue, look
from tests.ranks import REPOSITORY
from tests.test_stored_run import STORED

LOCK = "lock/1795283172940"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder that kill -9 left, of long ago, as runs/one; its holder gives no sign of life."""
    folder = Path(shutil.copytree(STORED / "run", tmp_path / "runs" / "one"))
    os.utime(folder / LOCK, (0, 0))
    return folder


def status(*arguments: str | Path, cwd: Path, squeue: str = "") -> subprocess.CompletedProcess[str]:
    """Runs it; squeue: what SLURM's queue says, which is else none of this machine's business."""
    (programs := cwd / "bin").mkdir(exist_ok=True)
    path = "/usr/bin:/bin"
    if squeue:
        (programs / "squeue").write_text(f"#!/bin/sh\n{squeue}\n")
        (programs / "squeue").chmod(0o755)
        path = f"{programs}:{path}"
    command = [sys.executable, REPOSITORY / "launch" / "status.py", *arguments]
    return subprocess.run(command, cwd=cwd, env={**os.environ, "PATH": path}, capture_output=True, text=True)


def told(run: Path, cwd: Path, squeue: str = "exit 0") -> tuple[dict[str, Any], int]:
    """What it says of a run as JSON, and its exit status."""
    done = status(run, "--json", cwd=cwd, squeue=squeue)
    assert done.stdout, done.stderr
    said: dict[str, Any] = json.loads(done.stdout)
    return said, done.returncode


def test_a_run_that_was_killed_is_told_from_its_folder_alone_and_nothing_is_written(run: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    said, code = told(run, tmp_path)
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert (said["state"], code) == ("failed", 21)
    assert "ended without saying why" in said["why"]
    expected = {"step": 10, "last_step": 12, "epoch": 5.0, "best_top1": pytest.approx(55.56, abs=0.01), "best_step": 8}
    expected |= {"checkpoint_step": 8, "restarts": 0, "world_size": 2, "arch": "crate_demo", "problems": []}
    assert {key: said[key] for key in expected} == expected
    text = status("one", cwd=tmp_path).stdout
    assert "10 of 12 (83.3 %), epoch 5.00 of 6" in text
    assert "best 55.56 % at step 8" in text


def test_states_and_their_exit_statuses(run: Path, tmp_path: Path) -> None:
    folder = RunFolder(run)
    with folder.ledger.open("a") as ledger:
        ledger.write(json.dumps({"event": "end", "time": time.time(), "up_s": 3.0}) + "\n")
    said, code = told(run, tmp_path)
    assert (said["state"], code) == ("stopped", 12)
    assert "has saved step 8" in said["why"]

    os.utime(run / LOCK)  # a holder elsewhere makes a number
    assert told(run, tmp_path)[1] == 10
    for path in (folder.recipe_file, folder.metrics, folder.ledger):
        os.utime(path, (0, 0))
    folder.ledger.write_text(json.dumps({"event": "steps", "time": time.time() - 3600, "after": 1, "step": 2}) + "\n")
    said, code = told(run, tmp_path)
    assert (said["state"], code) == ("stuck", 20)
    assert "no step, evaluation or save for 60 minutes" in said["why"]

    os.utime(run / LOCK, (0, 0))
    folder.model("last").touch()
    (folder.checkpoints / "step-00000008").rename(folder.checkpoints / "step-00000012")
    assert told(run, tmp_path)[1] == 0
    folder.recipe_file.write_text("[half")
    said, code = told(run, tmp_path)
    assert (said["state"], code) == ("failed", 21)
    assert any("recipe.toml" in problem for problem in said["problems"])


@pytest.mark.parametrize(
    ("squeue", "state", "expected"),
    [
        ("4242|4242|PENDING|0:00|1:00|N/A||Resources", "waiting", "waits for nodes to become free (Resources)"),
        (
            "9|4242|PENDING|0:00|1:00|2031-01-02T03:04:05||QOSMaxJobsPerUserLimit",
            "waiting",
            "start 2031-01-02 03:04:05",
        ),
        ("4242|4242|RUNNING|1:00|59:00|{now}|n[0-3]|None", "running", "it is starting"),
        ("4242|4242|COMPLETING|1:00|59:00|{now}|n[0-3]|None", "running", "it is starting"),
        ("4242|4242|SUSPENDED|1:00|59:00|{now}|n[0-3]|None", "running", "has suspended its job"),
        ("17|17|PENDING|0:00|1:00|N/A||Priority", "failed", "without saying why"),
    ],
)
def test_the_queue_is_asked_for_the_jobs_of_the_folder(
    squeue: str, state: str, expected: str, run: Path, tmp_path: Path
) -> None:
    (run / "slurm" / "4242").mkdir(parents=True)
    RunFolder(run).metrics.unlink()
    RunFolder(run).ledger.unlink()
    now = time.strftime("%Y-%m-%dT%H:%M:%S")
    said, _ = told(run, tmp_path, f"echo '{squeue.format(now=now)}'")
    assert said["state"] == state
    assert expected in said["why"]
    assert status("4242", cwd=tmp_path).stdout.startswith(f"{run}: ")  # found by its job, too


def test_a_copy_of_a_run_folder_has_not_the_job_of_the_original(run: Path, tmp_path: Path) -> None:
    (run / "slurm" / "4242").mkdir(parents=True)
    copy = shutil.copytree(run, run.parent / "two")
    squeue = f"echo '4242|4242|RUNNING|1:00|59:00|N/A|n0|None|{run}/slurm/.submission_file_1.sh'"
    assert told(run, tmp_path, squeue)[0]["job"] == "4242"
    os.utime(copy / LOCK, (0, 0))
    assert told(copy, tmp_path, squeue)[0]["job"] is None


def test_what_a_log_says_does_not_command_the_terminal(run: Path, tmp_path: Path) -> None:
    (run / "logs").mkdir()
    RunFolder(run).log_file(0).write_text("2026-01-01 10:00:00 W \033]0;owned\007\x9b2J\n")
    shown = status(run, cwd=tmp_path, squeue="exit 0").stdout
    assert "?]0;owned??2J" in shown


def test_where_slurm_cannot_be_asked_the_log_says_whether_the_job_waits(run: Path, tmp_path: Path) -> None:
    (job := run / "slurm" / "4242").mkdir(parents=True)
    log = job / "4242_0_log.out"
    log.write_text("crate-dist start 0.1: on n0\ncrate-dist: ended with status 76: requeueing\nslurmstepd: error\n")
    for squeue in ("", "echo no controller >&2; exit 1"):
        said, code = told(run, tmp_path, squeue)
        assert (said["state"], code) == ("waiting", 11)
    assert "SLURM does not answer: no controller" in said["why"]
    log.write_text("crate-dist start 0.1: on n0\ncrate-dist: FAILED: it needs a person: rank 1 on node n0: no data\n")
    said, code = told(run, tmp_path, "")
    assert (said["fault"], code) == ("FAILED: it needs a person: rank 1 on node n0: no data", 21)


@pytest.mark.parametrize(
    ("end", "state"),
    [
        ("", "running"),
        (
            "crate-dist start 0.1: rank 0 on node n0\nslurmstepd: error: *** STEP 1.0 ON n0 CANCELLED AT 1 ***\n",
            "running",
        ),
        ("slurmstepd: error: *** JOB 4242 ON n0 CANCELLED AT 2026-01-01T10:00:00 DUE TO PREEMPTION ***\n", "running"),
        ("slurmstepd: error: *** JOB 4242 ON n0 CANCELLED AT 2026-01-01T10:00:00 ***\n", "failed"),
        ("crate-dist: GIVEN UP: three starts in a row\n", "failed"),
        ("crate-dist: not started, since it was asked to stop; …\n", "failed"),
    ],
)
def test_a_job_whose_log_says_no_end_has_not_failed_where_slurm_does_not_answer(
    end: str, state: str, run: Path, tmp_path: Path
) -> None:
    """As between the start of the ranks and the lock of rank 0."""
    (job := run / "slurm" / "4242").mkdir(parents=True)
    (job / "4242_0_log.out").write_text(f"crate-dist start 0.1: on n0\n{end}")
    queue = Queue({}, "SLURM does not answer")
    assert (said := look(run, queue)).state == state
    if state == "running":
        assert "SLURM does not answer" in said.why
        assert look(run, queue, stuck_after_s=0).state == "stuck"
        RunFolder(run).stop_request.touch()
        assert look(run, queue).state == "running"


@pytest.mark.parametrize("jobs", [True, False])
def test_a_run_is_asked_to_stop_where_nobody_can_tell_that_it_has_ended(jobs: bool, run: Path, tmp_path: Path) -> None:
    if jobs:
        (job := run / "slurm" / "4242").mkdir(parents=True)
        (job / "4242_0_log.out").write_text("crate-dist start 0.1: on n0\n")
    assert "asked to stop" in status("stop", run, cwd=tmp_path, squeue="exit 1").stdout
    assert RunFolder(run).stop_request.exists()


def test_a_sweep_is_asked_to_stop_even_where_slurm_refuses_one_of_its_runs(run: Path, tmp_path: Path) -> None:
    runs = [Path(shutil.copytree(run, run.parent / "sweep" / name)) for name in "abc"]
    for number, path in enumerate(runs):
        (path / "slurm" / f"7_{number}").mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    scancel = tmp_path / "bin" / "scancel"
    scancel.write_text(f"#!/bin/sh\necho $* >> {tmp_path}/scancelled\ncase $* in *7_0) echo ended >&2; exit 1;; esac\n")
    scancel.chmod(0o755)
    states = ["RUNNING", "SUSPENDED", "PENDING"]
    queue = "; ".join(f"echo '{9 + n}|7_{n}|{state}|1:00|59:00|N/A|n0|None'" for n, state in enumerate(states))
    done = status("stop", run.parent / "sweep", cwd=tmp_path, squeue=queue)
    assert done.returncode == 1
    assert "7_0` failed: ended; the request to stop is put down" in done.stderr
    assert "job 7_1 is suspended: once it is resumed it saves and ends" in done.stdout
    assert "job 7_2, which waited, is cancelled" in done.stdout
    assert (tmp_path / "scancelled").read_text() == "--signal=USR2 7_0\n7_2\n"
    assert all(RunFolder(path).stop_request.exists() for path in runs)


def test_a_number_that_is_none_is_null_in_json(run: Path, tmp_path: Path) -> None:
    with RunFolder(run).metrics.open("a") as metrics:
        metrics.write('{"step": 11, "train/loss": NaN, "train/epoch": 5.5, "speed/images_per_s": Infinity}\n')
    done = status(run, "--json", cwd=tmp_path, squeue="exit 0").stdout
    said = json.loads(done, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))
    assert (said["step"], said["loss"], said["images_per_s"]) == (11, None, None)


def test_a_damaged_record_is_no_traceback(run: Path, tmp_path: Path) -> None:
    RunFolder(run).record_file.write_text("{half")
    done = status("resume", run, "--dry-run", cwd=tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "run.json does not say how the run was started" in done.stderr


def test_a_folder_that_cannot_be_read_hides_no_other(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (closed := run.parent / "closed").mkdir()
    listed = os.listdir

    def listdir(path: str | Path) -> list[str]:  # as for who is not root
        if Path(path) == closed:
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "listdir", listdir)
    assert find_runs([], run.parent) == [run]
    assert f"note: {closed} is passed over" in capsys.readouterr().err


def test_runs_are_found_by_path_name_array_and_job(run: Path, tmp_path: Path) -> None:
    runs = run.parent
    array = [Path(shutil.copytree(run, runs / "sweep" / name)) for name in ("lr1", "lr2")]
    shutil.copytree(run, runs / "sweep" / "lr1.before-2026-01-01")
    (array[0] / "slurm" / "7_0").mkdir(parents=True)
    (array[1] / "slurm" / "7_1").mkdir(parents=True)
    assert find_runs([], runs) == [run, *array]
    assert find_runs(["one"], runs) == find_runs([str(run)], runs) == [run]
    assert find_runs(["sweep"], runs) == find_runs(["7"], runs) == array
    assert find_runs(["7_1", "sweep/lr1", "7"], runs) == array[::-1]
    with pytest.raises(UserError, match=r"nothing: no run folder, .*; runs there are one, sweep/lr1, sweep/lr2"):
        find_runs(["nothing"], runs)
    with pytest.raises(UserError, match=r"no run in .*none"):
        find_runs([], tmp_path / "none")
    table = status(cwd=tmp_path, squeue="exit 0")
    assert table.returncode == 21
    rows = [line.split()[:2] for line in table.stdout.splitlines()[1:4]]
    assert rows == [[name, "failed"] for name in ("one", "sweep/lr1", "sweep/lr2")]


def test_a_reader_that_has_seen_enough_is_no_error(run: Path, tmp_path: Path) -> None:
    for number in range(3):
        shutil.copytree(run, run.parent / f"copy-{number}")
    program = f"{sys.executable} {REPOSITORY / 'launch' / 'status.py'}"
    for arguments in ("", "list", "--json"):
        line = f"{program} {arguments} | head -n 1; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True)
        assert (len(done.stdout.splitlines()), done.stderr) == (1, "")


def test_a_command_without_a_run_says_what_would_do(run: Path, tmp_path: Path) -> None:
    for command in ("logs", "stop", "resume"):
        done = status(command, cwd=tmp_path)
        assert done.returncode == 2
        assert "which run?" in done.stderr
    done = status("logs", "one", "--rank", "1", cwd=tmp_path)
    assert (done.returncode, "has no log yet" in done.stderr) == (1, True)
