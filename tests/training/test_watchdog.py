"""A rank that does not arrive ends the job: named, with stacks, and with the status for which it is started again."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from crate_dist.run.exit_status import TRY_AGAIN
from crate_dist.training.flight_records import flight_recorders
from crate_dist.training.watchdog import Watchdog
from crate_dist.world import World
from tests.chaos.ranks import spawn_statuses

pytestmark = pytest.mark.spawn


def log_to(path: Path) -> None:
    import logging

    logging.basicConfig(filename=path, force=True)


def hang_on_rank_1(world: World, device: torch.device, folder: Path) -> None:
    log = folder / str(world.rank)
    log_to(log)
    with Watchdog(world, timeout_s=4, log_file=log) as watchdog:
        for step in range(2):
            watchdog.beat(f"taking step {step}")
            torch.distributed.barrier()
            time.sleep(1.2)
        if world.rank == 1:
            _asleep()
        watchdog.beat("taking step 2")
        torch.distributed.barrier()


def _asleep() -> None:
    time.sleep(600)


def stop_rank_0(world: World, device: torch.device, folder: Path) -> None:
    import os

    log = folder / str(world.rank)
    log_to(log)
    with Watchdog(world, timeout_s=4, log_file=log) as watchdog:
        watchdog.beat("taking step 0")
        torch.distributed.barrier()
        if world.rank == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
        torch.distributed.barrier()


def stay_busy(world: World, device: torch.device, folder: Path) -> None:
    log_to(folder / str(world.rank))
    with Watchdog(world, timeout_s=3, log_file=folder / str(world.rank)) as watchdog:
        watchdog.beat("compiling", patience=4)
        time.sleep(4.5)
        for step in range(10):
            watchdog.beat(f"taking step {step}")
            time.sleep(0.5)
        torch.distributed.barrier()


def test_a_rank_that_hangs_is_named_and_shows_where(tmp_path: Path) -> None:
    assert spawn_statuses(hang_on_rank_1, 2, tmp_path) == [TRY_AGAIN, TRY_AGAIN]
    waiting, hanging = ((tmp_path / str(rank)).read_text() for rank in range(2))
    assert "behind the others: rank 1 (taking step 1)" in waiting
    assert "while taking step 2; every thread's stack follows" in waiting
    assert "in barrier" in waiting
    assert "in _asleep" in hanging
    told = re.search(r"torchfrtrace (--prefix \S+) (\S+)", waiting)
    assert told
    read = [sys.executable, "-m", "torch.distributed.flight_recorder.fr_trace", *told[1].split(), told[2]]
    read_back = subprocess.run(read, capture_output=True, text=True, check=True)
    assert "collective: gloo:barrier\nmissing ranks: {1}" in read_back.stdout + read_back.stderr


def test_nccl_has_a_record_of_its_own_beside_the_one_of_gloo() -> None:
    def generic(**_: object) -> bytes:
        return b""

    def nccl(**_: object) -> bytes:
        return b""

    both = SimpleNamespace(_dump_fr_trace=generic, _dump_nccl_trace=nccl)
    assert flight_recorders("nccl", both) == {"gloo": generic, "nccl": nccl}
    assert flight_recorders("gloo", both) == {"gloo": generic}
    until_2_9 = SimpleNamespace(_dump_nccl_trace=nccl)
    assert flight_recorders("nccl", until_2_9) == {"nccl": nccl}
    assert flight_recorders("gloo", until_2_9) == {"gloo": nccl}
    assert flight_recorders("gloo", SimpleNamespace()) == {}


def test_a_stopped_rank_0_is_named_though_it_keeps_what_the_others_know(tmp_path: Path) -> None:
    assert spawn_statuses(stop_rank_0, 2, tmp_path, wait_for=1)[1] == TRY_AGAIN
    said = (tmp_path / "1").read_text()
    assert "behind the others: rank 0" in said
    assert "in barrier" in said


def test_who_makes_progress_is_left_alone(tmp_path: Path) -> None:
    assert spawn_statuses(stay_busy, 2, tmp_path) == [0, 0]
    assert (tmp_path / "0").read_text() == ""
