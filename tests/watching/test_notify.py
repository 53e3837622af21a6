"""Who is told, of what, how often, and that it is no concern of the run's."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from crate_dist.run.folder import RunFolder
from crate_dist.watching import notify
from crate_dist.watching.notify import tell, watched
from tests.cluster.testbed import wait_until
from tests.test_stored_run import STORED

RUN = STORED / "run"


def test_the_command_gets_what_status_says_and_why_it_failed(tmp_path: Path) -> None:
    note = tmp_path / "a note"
    said = tell(f"cat > {shlex.quote(str(note))}; test $CRATE_EVENT = failed", RUN, "failed", "the 'disk' is \"full\"")
    assert said == "crate-dist: failed: the --notify command succeeded"
    about = json.loads(note.read_text())
    assert {key: about[key] for key in ("event", "state", "fault", "step", "last_step", "run")} == {
        "event": "failed",
        "state": "failed",
        "fault": "the 'disk' is \"full\"",
        "step": 10,
        "last_step": 12,
        "run": str(RUN),
    }


@pytest.mark.parametrize(
    ("command", "run", "becomes"),
    [
        ("exit 3", RUN, "ended with 3"),
        ("no-such-command", RUN, "ended with 127"),
        ("sleep 60 & sleep 60", RUN, "took more than 0 s, and was ended"),
        ("sleep 60 &", RUN, "took more than 0 s, and was ended"),
        ("exec <&-; true", RUN, "succeeded"),  # it does not want to know
        ("cat", Path("/nonexistent"), "succeeded"),
    ],
)
def test_a_command_that_fails_or_hangs_is_told_of_and_ended(
    command: str, run: Path, becomes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "TIMEOUT_S", 0.3 if "sleep" in command else 30.0)
    assert tell(command, run, "done") == f"crate-dist: done: the --notify command {becomes}"


def test_each_stall_is_told_once(tmp_path: Path) -> None:
    (folder := RunFolder(tmp_path / "run")).make()
    note = tmp_path / "note"
    with watched(f"echo $CRATE_EVENT >> {note}", folder.path, stuck_after_min=0.2 / 60):
        wait_until(note.exists, "first stall", 30)
        folder.metrics.write_text("{}\n")
        wait_until(lambda: len(note.read_text().splitlines()) == 2, "second stall", 30)
        threading.Event().wait(1)  # five times as long as a stall is
    assert note.read_text() == "stuck\nstuck\n"


def test_a_watch_ends_with_its_parent(tmp_path: Path) -> None:
    """As a batch script's that was killed."""
    end = threading.Event()
    thread = threading.Thread(target=notify.watch, args=(f"touch {tmp_path}/told", tmp_path, 0.2, end, -1))
    thread.start()
    thread.join(30)
    assert not thread.is_alive()
    assert not (tmp_path / "told").exists()


def test_a_bare_command_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(notify.VARIABLE, raising=False)
    with pytest.raises(SystemExit):
        notify.main(["done", str(RUN)])
    assert "CRATE_NOTIFY is not set" in capsys.readouterr().err


def test_what_a_command_puts_behind_has_its_minute(tmp_path: Path) -> None:
    assert tell(f"(sleep 0.3; touch {tmp_path}/done) &", RUN, "done").endswith("succeeded")
    assert (tmp_path / "done").exists()


def test_a_command_has_run_once_even_where_the_log_takes_no_line(tmp_path: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "crate_dist.watching.notify", "done", RUN],
            env={**os.environ, notify.VARIABLE: f"echo once >> {tmp_path}/note"},
            stdout=full,
        )
    assert done.returncode == 0  # else the batch script runs it again
    assert (tmp_path / "note").read_text() == "once\n"
