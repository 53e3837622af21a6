"""What TensorBoard shows goes on over restarts, clocks that are set, and disks that are full for a while."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from crate_dist.files import AppendedFile, mended_lines, whole_lines
from crate_dist.training import tensorboard as curves_module
from crate_dist.training.tensorboard import Curves


def shown(folder: Path) -> list[tuple[int, float]]:
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


def write(folder: Path, steps: range, value: float, purge_step: int | None = None) -> None:
    curves = Curves(folder, purge_step)
    for step in steps:
        curves.scalars({"loss": value}, step)
    curves.sync()
    curves.close()


@pytest.mark.parametrize("jump_s", [3600.0, 0.0, -3600.0])
def test_a_restart_goes_on_from_its_step_whatever_the_clock_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    write(tmp_path, range(1, 8), 1.0)
    for restart in (1, 2):
        now = curves_module.time.time() + restart * jump_s
        with monkeypatch.context() as clock:
            clock.setattr(curves_module.time, "time", lambda: now)  # noqa: B023
            write(tmp_path, range(5, 9), float(-restart), purge_step=5)
    assert shown(tmp_path) == [*((step, 1.0) for step in range(1, 5)), *((step, -2.0) for step in range(5, 9))]


def test_what_a_crash_has_cut_off_hides_nothing_that_follows(tmp_path: Path) -> None:
    write(tmp_path, range(1, 6), 1.0)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-7])
    write(tmp_path, range(4, 7), 2.0, purge_step=4)
    assert shown(tmp_path) == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0), (5, 2.0), (6, 2.0)]


def test_what_does_not_fit_onto_the_disk_is_written_when_there_is_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "lines"
    file = AppendedFile(path)
    file.append(b"one\n")
    room = iter([2, 0])

    def nearly_full(descriptor: int, data: bytes) -> int:
        count = next(room, 0)
        if not count:
            raise OSError(28, "No space left on device")
        with path.open("ab") as other:
            return other.write(data[:count])

    with monkeypatch.context() as full:
        full.setattr("crate_dist.files.os.write", nearly_full)
        file.append(b"two\n")
        file.append(b"three\n")
    assert path.read_bytes() == b"one\ntw"
    assert whole_lines(path) == ["one"]  # and who looks meanwhile takes nothing away
    assert caplog.text.count("No space left on device") == 1
    file.append(b"four\n")
    assert whole_lines(path) == ["one", "two", "three", "four"]


def test_a_line_that_a_crash_has_cut_off_is_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    assert mended_lines(path) == []
    path.write_bytes(b"one\ntwo\nthr\xc3")
    assert whole_lines(path) == mended_lines(path) == ["one", "two"]
    assert path.read_bytes() == b"one\ntwo\n"


def test_a_file_that_was_replaced_is_gone_on_with(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    file = AppendedFile(path)
    file.append(b"one\n")
    (tmp_path / "other").write_bytes(b"another\n")
    (tmp_path / "other").replace(path)
    file.sync()
    file.append(b"two\n")
    assert path.read_bytes() == b"another\ntwo\n"
