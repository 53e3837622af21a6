"""One command examines a machine: it ends in time, keeps what it found, and says in its status how much failed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from crate_dist.doctor import machine
from crate_dist.doctor.report import as_text
from crate_dist.doctor.run import QUICK, STAGES, limits
from tests.ranks import REPOSITORY

pytestmark = pytest.mark.spawn

HERE = ("quick", "between", "end-to-end", "data", "faults")
"""Stages that are run as a whole here; those that measure have tests of their own."""


def doctor(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    """Starts the command; its JSON is `folder`/doctor.json, and it sees no GPU."""
    (folder / "scratch").mkdir(parents=True)
    return subprocess.Popen(
        [sys.executable, "-m", "crate_dist.doctor", "--json", "doctor.json", "--scratch", "scratch", *arguments],
        cwd=folder,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Reads the stages of the JSON, by name; none while there is no JSON yet."""
    path = folder / "doctor.json"
    return {stage["name"]: stage for stage in json.loads(path.read_text())["stages"]} if path.exists() else {}


def left_behind(folder: Path) -> list[str]:
    """Lists the processes that name the folder's scratch in their command line."""
    lines = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(process.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:
            continue
    return [line for line in lines if str(folder / "scratch") in line or "scratch/crate-doctor" in line]


def stage_of(run: subprocess.Popen[str]) -> int:
    """The process of the stage that is at work."""
    (stage,) = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    return int(stage)


def wait_until(well: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 120
    while not well():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_a_cpu_is_examined_whole_in_small(tmp_path: Path) -> None:
    run = doctor(tmp_path, "--full", "--budget", "420", "--only", *HERE)
    table, progress = run.communicate(timeout=430)
    stages = read(tmp_path)
    failed = [
        (name, finding) for name, one in stages.items() for finding in one["findings"] if finding["passed"] is False
    ]
    assert not failed
    assert run.returncode == 0, progress
    assert list(stages) == list(HERE)
    assert {one["state"] for one in stages.values()} == {"done"}
    found = {finding["name"] for one in stages.values() for finding in one["findings"] if finding["passed"]}
    assert found >= {
        *("packages", "two processes meet with gloo", "told to stop", "resumed at the step of the stop"),
        *("finished, weights exported", "curve across the restart", "white box", "accuracy by crate_dist.evaluate"),
        *("a rank that is stopped", "the rank behind is named", "goes on after each, to the end", "ranks"),
    }
    assert all(finding["name"] in table for one in stages.values() for finding in one["findings"])
    assert max(map(len, table.splitlines())) <= 100
    assert "torch 2" in table
    assert "0 checks failed" in table
    assert not any(secret in table for secret in (os.environ.get("USER", "nobody's"), str(Path.home()) + "/"))
    assert not list((tmp_path / "scratch").iterdir())
    assert not left_behind(tmp_path)


def test_a_stage_that_crashes_keeps_what_it_found_and_ctrl_c_shows_what_there_is(tmp_path: Path) -> None:
    run = doctor(tmp_path, "--budget", "300", "--only", "end-to-end", "data", "faults")
    wait_until(lambda: any("crate_dist.train" in line for line in left_behind(tmp_path)), "a rank of a stage")
    os.kill(stage_of(run), signal.SIGSEGV)
    wait_until(lambda: read(tmp_path)["data"]["state"] == "running", "the stage behind it")
    assert not [line for line in left_behind(tmp_path) if "crate_dist.train" in line]
    run.send_signal(signal.SIGINT)
    table, _ = run.communicate(timeout=60)
    stages = read(tmp_path)
    assert [one["state"] for one in stages.values()] == ["failed", "interrupted", "not run"]
    crashed = stages["end-to-end"]["findings"]
    assert crashed[0]["name"] == "images converted to shards"
    assert crashed[-1]["value"].startswith("ended by signal 11 (SIGSEGV) after ")
    assert "Segmentation fault" in crashed[-1]["note"]
    assert (tmp_path / "doctor-logs" / "end-to-end.log").stat().st_size
    assert run.returncode == 130
    assert "images converted to shards" in table
    assert "data: interrupted" in table
    assert "1 checks failed" in table
    assert not left_behind(tmp_path)


def test_a_doctor_that_is_killed_leaves_nothing_behind_and_one_whose_terminal_is_gone_reports(tmp_path: Path) -> None:
    killed, left_alone = doctor(tmp_path / "killed", "--only", "end-to-end"), tmp_path / "left alone"
    wait_until(lambda: any("crate_dist.train" in line for line in left_behind(tmp_path)), "a rank of a stage")
    killed.kill()
    killed.communicate()
    wait_until(lambda: not left_behind(tmp_path), "the end of all that it had started")
    run = doctor(left_alone, "--only", "ceilings")
    wait_until(lambda: read(left_alone).get("ceilings", {}).get("state") == "running", "the stage")
    run.send_signal(signal.SIGHUP)
    table, _ = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "ceilings: interrupted" in table
    assert not left_behind(left_alone)


def test_the_report_names_no_folder_no_host_and_no_user(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {
        "TORCHINDUCTOR_CACHE_DIR": "/scratch/alice",
        "NCCL_COMM_ID": "gpu17.alice-lab.org:4000",
        "NCCL_SOCKET_IFNAME": "eth0",
        "PYTORCH_ALLOC_CONF": "expandable_segments:True,garbage_collection_threshold:0.8",
        "GLOO_SOCKET_IFNAME": "10.1.2.3",
    }
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    said = machine.describe()["environment"].split()
    assert {"TORCHINDUCTOR_CACHE_DIR=set", "NCCL_COMM_ID=set", "GLOO_SOCKET_IFNAME=set"} <= set(said)
    assert {f"{name}={given[name]}" for name in ("NCCL_SOCKET_IFNAME", "PYTORCH_ALLOC_CONF")} <= set(said)
    table = as_text({}, [], Path("/home/alice/doctor.json"))
    assert "alice" not in table
    assert "doctor.json" in table
    assert machine.without_folders("No such file: '/home/alice/x y/run/a.txt', see /dev/shm") == (
        "No such file: '…/x y/run/a.txt', see /dev/shm"
    )


def test_more_than_quick_has_the_whole_time_and_keeps_its_logs(tmp_path: Path) -> None:
    said = {}
    for stage in ("quick", "speed"):
        planned = [sys.executable, "-m", "crate_dist.doctor", "--only", stage, "--dry-run"]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        said[stage] = subprocess.run(planned, capture_output=True, text=True, cwd=tmp_path, env=environment).stdout
    assert float(said["quick"].split()[1]) == 57
    assert float(said["speed"].split()[1]) == 537


def test_a_stage_that_hangs_is_ended_at_its_limit_and_one_without_time_is_not_begun(tmp_path: Path) -> None:
    run = doctor(tmp_path, "--budget", "8", "--only", "quick", "compile", "between")
    hung = []
    while run.poll() is None:
        for name, one in read(tmp_path).items():
            if one["state"] == "running" and name not in hung:
                os.kill(stage_of(run), signal.SIGSTOP)
                hung.append(name)
        time.sleep(0.02)
    table, _ = run.communicate()
    stages = read(tmp_path)
    assert {one["state"] for name, one in stages.items() if name in hung} == {"failed"}
    assert {one["state"] for name, one in stages.items() if name not in hung} == {"not run"}
    assert all(stages[name]["findings"][-1]["value"].startswith("ended at its limit of ") for name in hung)
    assert len(hung) in (1, 2)
    assert run.returncode == len(stages)
    assert f"{len(stages)} checks failed" in table
    assert not left_behind(tmp_path)


def test_a_report_that_cannot_be_written_is_refused_before_anything_runs(tmp_path: Path) -> None:
    (tmp_path / "doctor.json").mkdir()
    run = doctor(tmp_path, "--only", "quick")
    table, said = run.communicate(timeout=30)
    assert run.returncode == 1
    assert not table
    assert said.startswith("error: ")
    assert "doctor.json" in said


def test_the_stages_share_the_budget_and_what_one_does_not_need_goes_to_the_next() -> None:
    whole = limits(STAGES, 540)
    assert sum(whole) == pytest.approx(540)
    assert limits(STAGES[1:], 540 - 5)[0] > whole[1]
    assert limits([QUICK], 57) == [57]


def test_the_plan_can_be_read_before_it_is_run(tmp_path: Path) -> None:
    run = doctor(tmp_path, "--full", "--dry-run")
    said, _ = run.communicate(timeout=30)
    assert [line.split()[0] for line in said.splitlines()] == [stage.name for stage in STAGES]
    assert not (tmp_path / "doctor.json").exists()
