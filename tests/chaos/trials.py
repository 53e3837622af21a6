"""The faults, one function each: what is done to a run, and what is said of it in the table."""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from crate_dist.checkpoint.loading import list_checkpoints
from crate_dist.run.exit_status import STOPPED, TRY_AGAIN
from tests.chaos import faults
from tests.chaos.faults import Fault
from tests.chaos.ranks import wait_until
from tests.chaos.trial import Trial

Disturb = Callable[[Trial], None]


@dataclass(frozen=True)
class Case:
    """A fault, by name, and how it is done to a run that does not exist yet.

    short: whether it is one of those that every `make test` tries
    """

    name: str
    disturb: Disturb
    short: bool = False


def killed(trial: Trial, point: str, rank: int, one: int, every: int) -> None:
    """kill -9 before the nth call of a point in a rank: of that rank, and in the next start of every rank; 0: not."""
    if one:
        trial.kill_one(rank, Fault(point, one))
    if every:
        trial.kill_all(rank, Fault(point, every))


def killed_while_resuming(point: str) -> Disturb:
    """kill -9 of all, and again in the start that was to go on from there."""

    def disturb(trial: Trial) -> None:
        trial.kill_all(1, Fault("taking a step", nth=12))
        trial.kill_one(1, Fault(point))

    return disturb


def stopped(trial: Trial, rank: int, point: str, nth: int) -> None:
    """SIGSTOP: the other rank's log says which one hangs, and the other ends; the launcher ends the stopped one."""
    timeout = ("--set", "safety.hang_timeout_s=20")
    with trial.start(*timeout, faults={rank: Fault(point, nth)}) as ranks:
        ranks.wait_for_fault(rank)
        began = time.monotonic()
        other = 1 - rank
        wait_until(lambda: ranks.running() == [rank], "end of the rank that waits for the stopped one")
        waited = time.monotonic() - began
        assert ranks.processes[other].exitcode == TRY_AGAIN, ranks.output(other)
    log = trial.run.log_file(other).read_text()
    assert f"behind the others: rank {rank}" in log, log
    assert "Current thread" in log, "no stacks"
    trial.said.append(f"named in the log of rank {other}, which ended after {waited:.0f} s")


def disk_is_full_in_one_save(trial: Trial, rank: int, point: str, nth: int) -> None:
    """One save fails on one rank. The training goes on, in the same start."""
    with trial.start(faults={rank: Fault(point, nth, "disk full")}) as ranks:
        assert ranks.wait() == [0, 0], ranks.output(0)
        said = ranks.output(0)
    assert "SAVING FAILED (1 of at most 3 in a row); training goes on" in said
    assert "No space left on device" in said
    trial.said.append("one save failed with a warning, training went on")


def disk_is_full_for_a_while(trial: Trial) -> None:
    """A real one: everything that the run writes fails, until there is room again. No restart."""
    with small_disk(trial.folder / "run", megabytes=24) as filler, trial.start() as ranks:
        trial.lost_a_save = True
        wait_until(lambda: "step 11/25" in ranks.output(0), "eleventh step")
        fill(filler)
        wait_until(lambda: "SAVING FAILED" in ranks.output(0), "failing save")
        filler.unlink()
        assert ranks.wait() == [0, 0], ranks.output(0)
        trial.said.append(f"{ranks.output(0).count('SAVING FAILED')} saves failed with a warning, training went on")


@contextmanager
def small_disk(run: Path, megabytes: int) -> Iterator[Path]:
    """A tmpfs in the place of a run folder, which is kept when it goes away; gives a file to fill it with."""
    run.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", run], check=True)
    try:
        yield run / ".filler"
        shutil.copytree(run, run.with_name("kept"))
    finally:
        subprocess.run(["umount", "--lazy", run], check=True)
    run.rmdir()
    run.with_name("kept").rename(run)


def fill(path: Path) -> None:
    """Takes all the room that there is."""
    with path.open("wb", buffering=0) as file:
        for size in (1 << 16, 1):
            try:
                while True:
                    file.write(b"\0" * size)
            except OSError:
                continue


def can_mount() -> bool:
    """Tells whether this is root, and free to mount."""
    return (
        os.geteuid() == 0 and subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "none", "/mnt"]).returncode == 0
    )


def damaged(trial: Trial, what: str, damage: Callable[[Path], None]) -> None:
    """The newest checkpoint is damaged between two starts: it is named, and the one before is used."""
    trial.kill_all(0, Fault("taking a step", nth=14))
    newest = list_checkpoints(trial.run.checkpoints)[-1]
    damage(newest.path / what)
    trial.unreadable += [newest.path.name] if what == "manifest.json" else []
    said = trial.finish()
    assert f"damaged checkpoint passed over: {newest.path}" in said
    assert trial.restarts()[-1] < newest.step
    trial.said.append("named and passed over for the one before")


def shard_is_truncated_between_two_starts(trial: Trial) -> None:
    """The second start says which, and what finds out more; with the shard restored the run goes on."""
    trial.kill_all(0, Fault("taking a step", nth=12))
    shard = next((trial.folder.parent / "shards" / "train").glob("*-000002.tar"))
    whole = shard.read_bytes()
    try:
        faults.truncate(shard)
        with trial.start() as ranks:
            assert ranks.wait() == [1, 1], ranks.output(0)
            said = ranks.output(0)
    finally:
        shard.write_bytes(whole)
    assert shard.name in said, said
    assert "data_prep/verify.py" in said, said
    trial.said.append("refused, naming the shard and verify.py; went on when it was restored")


def shard_is_truncated_in_the_middle(trial: Trial) -> None:
    """A loader worker finds it out; all ranks end."""
    trial.kill_all(0, Fault("taking a step", nth=12))
    shard = next((trial.folder.parent / "shards" / "train").glob("*-000001.tar"))
    whole = shard.read_bytes()
    try:
        with trial.start(faults={0: Fault("building the engine", action="stand still")}) as ranks:
            pid = ranks.wait_for_fault(0)
            faults.truncate(shard)
            os.kill(pid, 18)
            statuses = ranks.wait()
            said = [line for rank in range(2) for line in ranks.output(rank).splitlines() if line.startswith("error:")]
    finally:
        shard.write_bytes(whole)
    assert statuses != [0, 0]
    assert any(shard.name in line and "data_prep/verify.py" in line for line in said), said
    trial.said.append("all ranks ended, naming the shard and verify.py; went on when it was restored")


def port_is_taken(trial: Trial) -> None:
    """Another program listens at MASTER_PORT: said at once, and another port is as good."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with trial.start(port=port) as ranks:
            wait_until(lambda: 0 not in ranks.running(), "end of rank 0")
            assert ranks.processes[0].exitcode == TRY_AGAIN
            said = ranks.output(0)
    assert f"port {port} of 127.0.0.1 is in use" in said, said
    assert "MASTER_PORT" in said
    assert "Traceback" not in said
    trial.said.append("said in one line; another port is as good")


def clock_jumps(trial: Trial, seconds: float) -> None:
    """In the middle of a run, which is then killed, and goes on with a clock that is right again, or was."""
    jump = Fault("noting an evaluation", action="clock", seconds=seconds)
    with trial.start(faults={0: jump}) as ranks:
        wait_until(lambda: "step 13/25" in ranks.output(0), "step 13")
    trial.finish()


def first_clock_was_ahead(trial: Trial) -> None:
    """The clock was a day ahead in the first start."""
    with trial.start(faults={0: Fault("joining the other ranks", action="clock", seconds=86400.0)}) as ranks:
        wait_until(lambda: "step 13/25" in ranks.output(0), "step 13")


def told_in_an_evaluation_and_killed_in_the_next(trial: Trial) -> None:
    """SIGTERM leaves an evaluation; the start that makes it is killed before it saves, and the one after that again."""
    slow = Fault("evaluating", 1, "slow", times=4, seconds=1.0)
    with trial.start(faults={1: slow}) as ranks:
        ranks.wait_for_fault(1)
        ranks.processes[0].terminate()
        assert set(ranks.wait()) == {STOPPED}, ranks.output(0)
    for _ in range(2):
        trial.kill_all(0, Fault("beginning to save"))
    trial.said.append("left, and made by the next start")


def killed_at_random(trial: Trial, seed: int, about_s: float) -> None:
    """kill -9 of one rank or of all at a random moment; one time in five again and again."""
    rng = random.Random(seed)
    for _ in range(rng.choice([1, 1, 1, 1, 3])):
        seconds, victim = rng.uniform(0.0, about_s), rng.choice([0, 1, None])
        trial.kill_after(seconds, victim)
        who = "all ranks" if victim is None else f"rank {victim}"
        trial.said.append(f"{who} after {seconds:.2f} s")


def cases() -> list[Case]:
    """The faults at named points."""
    at = [
        # (point, rank, at which call of it that rank is killed, and all ranks are in the next start)
        ("joining the other ranks", 1, 1, 1),
        ("making the run folder", 0, 1, 1),
        ("writing the recipe", 0, 1, 1),
        ("locking the run folder", 0, 1, 1),
        ("noting the start", 0, 1, 1),
        ("building the engine", 1, 1, 1),
        ("taking a step", 0, 13, 8),
        ("taking a step", 1, 13, 8),
        ("writing a line of metrics", 0, 12, 8),
        ("copying the state", 1, 3, 3),
        ("making the folder of a save", 0, 3, 3),
        ("writing a rank's file", 0, 40, 40),
        ("writing a rank's file", 1, 40, 40),
        ("syncing a rank's file", 1, 3, 3),
        ("writing the manifest", 0, 3, 3),
        ("syncing the manifest", 0, 3, 3),
        ("syncing the folder of a save", 0, 3, 3),
        ("renaming the folder of a save", 0, 3, 3),
        ("renaming the folder of a save", 0, 7, 1),
        ("syncing the renamed folder", 0, 3, 3),
        ("setting a checkpoint aside", 0, 1, 1),
        ("removing a checkpoint's files", 0, 2, 2),
        ("removing a checkpoint's folder", 0, 1, 1),
        ("evaluating", 1, 2, 2),
        ("noting an evaluation", 0, 2, 1),
        ("beginning to save", 1, 4, 2),
        ("exporting the weights", 0, 1, 1),
        ("syncing the weights", 0, 2, 2),
        ("noting the end", 0, 1, 1),
    ]
    listed = [
        Case(
            f"kill -9 of rank {rank}, then of all, {point} ({one}, {every})",
            partial(killed, point=point, rank=rank, one=one, every=every),
        )
        for point, rank, one, every in at
    ]
    for point, nth in ("writing the recipe", 1), ("taking a step", 13), ("renaming the folder of a save", 3):
        disturb = partial(killed, point=point, rank=0, one=0, every=nth)
        listed.append(Case(f"kill -9 of all ranks, {point} ({nth})", disturb, short=True))
    worker = partial(killed, point="reading a batch", rank=1, one=20, every=0)
    listed.append(Case("kill -9 of a loader worker, reading a batch (20)", worker))
    again = killed_while_resuming("loading a checkpoint")
    listed.append(Case("kill -9 of all, and then of rank 1, loading a checkpoint", again))
    listed.append(Case("SIGTERM in an evaluation, then kill -9 twice", told_in_an_evaluation_and_killed_in_the_next))
    step, save = ("taking a step", 12), ("syncing a rank's file", 3)
    listed += [
        Case("SIGSTOP of rank 1, taking a step", partial(stopped, rank=1, point=step[0], nth=step[1]), True),
        Case("SIGSTOP of rank 0, taking a step", partial(stopped, rank=0, point=step[0], nth=step[1])),
        Case("SIGSTOP of rank 1, syncing its file", partial(stopped, rank=1, point=save[0], nth=save[1])),
        Case("SIGSTOP of rank 1, evaluating", partial(stopped, rank=1, point="evaluating", nth=2)),
        Case("SIGSTOP of rank 1, building the engine", partial(stopped, rank=1, point="building the engine", nth=1)),
        Case("SIGSTOP of rank 0, building the engine", partial(stopped, rank=0, point="building the engine", nth=1)),
    ]
    for point, nth, rank in (
        ("making the folder of a save", 3, 0),
        ("writing a rank's file", 40, 1),
        ("syncing a rank's file", 3, 0),
        ("writing the manifest", 3, 0),
        ("renaming the folder of a save", 3, 0),
        ("renaming the folder of a save", 7, 0),
    ):
        full = partial(disk_is_full_in_one_save, rank=rank, point=point, nth=nth)
        listed.append(Case(f"no space left on rank {rank}, {point} ({nth})", full))
    if can_mount():
        listed.append(Case("a disk that is full for a while", disk_is_full_for_a_while, True))
    listed += [
        Case("a flipped bit in a rank's file", partial(damaged, what="rank-00001.pt", damage=faults.flip_a_bit), True),
        Case("a flipped bit in a manifest", partial(damaged, what="manifest.json", damage=faults.flip_a_bit)),
        Case("a truncated file", partial(damaged, what="rank-00000.pt", damage=faults.truncate)),
        Case("a missing file", partial(damaged, what="rank-00000.pt", damage=faults.remove)),
        Case("a missing manifest", partial(damaged, what="manifest.json", damage=faults.remove)),
        Case("a wrong world size in a manifest", partial(damaged, what="manifest.json", damage=faults.forget_a_rank)),
        Case("a shard truncated between two starts", shard_is_truncated_between_two_starts),
        Case("a shard truncated under a running job", shard_is_truncated_in_the_middle),
        Case("a port that is taken", port_is_taken, True),
        Case("a clock that jumps a day back", partial(clock_jumps, seconds=-86400.0), True),
        Case("a clock that jumps a day ahead", partial(clock_jumps, seconds=86400.0)),
        Case("a clock that was a day ahead at the first start", first_clock_was_ahead),
    ]
    return listed
