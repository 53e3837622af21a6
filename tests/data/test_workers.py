"""Workers are forked where nobody else runs, share what is large, end with their rank, and are missed when they die."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crate_dist.data import workers
from crate_dist.data.index import ShardError
from crate_dist.data.shared import SharedArray
from crate_dist.data.workers import LostWorker, Workers, workers_of_rank
from tests.chaos.faults import Fault
from tests.chaos.ranks import wait_until
from tests.chaos.stacks import family
from tests.chaos.trial import Trial


def test_without_a_number_the_workers_follow_the_cores_of_the_rank() -> None:
    assert [workers_of_rank(None, cores) for cores in (1, 2, 6, 9, 96)] == [1, 1, 5, 8, 8]
    assert [workers_of_rank(chosen, 2) for chosen in (0, 1, 8)] == [0, 1, 8]


class Squares:
    """Says who makes it, too."""

    def __getitem__(self, number: int) -> tuple[int, int]:
        return number**2, os.getpid()


class Failing:
    """Item 3 is an error, item 5 the end of its process."""

    def __getitem__(self, number: int) -> int:
        if number == 3:
            raise ShardError("no such shard")
        if number == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        logging.getLogger("a worker's").warning("item %d", number)
        return number


class Arrays:
    """Where a worker sees them: the inode in which each lies, and whether it is what it should be."""

    def __init__(self, rows: np.ndarray, numbers: np.ndarray) -> None:
        self.rows, self.numbers, self.shared = rows, numbers, SharedArray((4, 1000))

    def __getitem__(self, number: int) -> tuple[str, int, int]:
        self.shared.array[number] = number + 1
        for line in Path("/proc/self/maps").read_text().splitlines():
            pages, _, _, _, inode, *_ = line.split()
            first, end = (int(address, 16) for address in pages.split("-"))
            if first <= self.rows.ctypes.data < end:
                break
        return inode, int(self.rows.sum()), int(self.numbers.sum())


@pytest.mark.timeout(30)
def test_two_servers_of_one_process_do_not_keep_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is forked from a process that holds the sockets of the first."""
    monkeypatch.setattr(workers, "_server", None)
    first, second = Workers(Squares(), 2, ahead=2), Workers(Squares(), 2, ahead=2)
    assert next(first)[0] == next(second)[0] == 0
    child = os.fork()
    if child == 0:
        os.execvp("sleep", ["sleep", "60"])  # nor does whatever else is forked
    servers = [loader._server._pid for loader in (first, second)]
    del first, second
    for server in servers:
        assert not Path(f"/proc/{server}").exists()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def test_items_come_in_their_order_and_workers_take_turns() -> None:
    made = list(Workers(Squares(), 3, ahead=2, first=4, stop=20))
    assert [square for square, _ in made] == [n**2 for n in range(4, 20)]
    assert [pid for _, pid in made] == [made[n % 3][1] for n in range(16)]
    assert len({pid for _, pid in made} - {os.getpid()}) == 3


def test_errors_and_log_lines_of_workers_come_to_the_rank_and_a_killed_one_is_missed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    items = Workers(Failing(), 2, ahead=1)
    assert [next(items) for _ in range(3)] == [0, 1, 2]
    assert [record.getMessage() for record in caplog.records] == ["item 0", "item 1", "item 2"]
    with pytest.raises(ShardError, match="no such shard"):
        next(items)
    assert next(items) == 4
    with pytest.raises(LostWorker, match=r"DataLoader worker \(pid \d+\) was killed by SIGKILL"):
        next(items)


def test_large_arrays_are_not_copied_to_each_worker(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", np.arange(100_000))
    rows, numbers = np.load(tmp_path / "rows.npy", mmap_mode="r"), np.arange(50_000)
    source, expected = Arrays(rows, numbers), (int(rows.sum()), int(numbers.sum()))
    made = list(Workers(source, 2, ahead=1, stop=4))
    assert made == [(str((tmp_path / "rows.npy").stat().st_ino), *expected)] * 4
    assert source.shared.array[:, 0].tolist() == [1, 2, 3, 4]
    np.save(tmp_path / "other.npy", np.arange(100_000)[::-1] + 1)
    (tmp_path / "other.npy").replace(tmp_path / "rows.npy")  # while this process has the one before
    replaced = list(Workers(source, 2, ahead=1, stop=4))
    assert [item[1:] for item in replaced] == [expected] * 4
    assert len({inode for inode, *_ in replaced}) == 1


def test_nothing_runs_beside_the_imports_when_the_server_is_forked() -> None:
    program = "import crate_dist.train, os; print(len(os.listdir('/proc/self/task')))"
    environment: dict[str, Any] = {**os.environ, "OMP_NUM_THREADS": "1"}
    said = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout == "1\n"


@pytest.mark.spawn
def test_a_ranks_workers_come_from_a_process_without_threads_and_end_with_it(trial: Trial) -> None:
    with trial.start(faults={0: Fault("evaluating")}) as ranks:
        rank = ranks.wait_for_fault(0)
        (server,) = (pid for pid in family([rank]) if _parent_and_threads(pid)[0] == rank)
        workers = set(family([rank])) - {rank, server}
        assert _parent_and_threads(rank)[1] > 1
        assert _parent_and_threads(server)[1] == 1
        assert len(workers) >= 2, "for training, and for the evaluation"
        assert {_parent_and_threads(pid)[0] for pid in workers} == {server}
        assert {os.getpgid(pid) for pid in workers} == {os.getpgid(rank)}
        ranks.kill(0)
        wait_until(lambda: not family([server, *workers]), "end of the workers of a killed rank", 10.0)


def _parent_and_threads(pid: int) -> tuple[int, int]:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[1]), int(fields[17])


class Ending:
    """Raises what ends an iteration."""

    def __getitem__(self, number: int) -> int:
        raise StopIteration


def test_an_item_cannot_end_the_items() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)in a DataLoader worker.*StopIteration"):
        list(Workers(Ending(), 1, ahead=1, stop=3))
