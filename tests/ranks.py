"""Starts several ranks on this machine, for tests of what only happens between processes."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from crate_dist.distributed import init_distributed
from crate_dist.run.folder import RunFolder
from crate_dist.world import World, free_port

REPOSITORY = Path(__file__).resolve().parents[1]


def lock_is_free(folder: RunFolder) -> bool:
    """Tells whether the last holder of a run folder has left in order."""
    newest = max((name for name in os.listdir(folder.lock) if name.isdecimal()), key=int)
    return bool(json.loads((folder.lock / newest).read_text())["free"])


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    """Returns the variables that torchrun would set, and one thread for each."""
    return {**local_world(rank, world_size, port).environment(), "OMP_NUM_THREADS": "1"}


def local_world(rank: int, world_size: int, port: int) -> World:
    """Returns the place of a rank of this machine."""
    return World(rank, world_size, rank, world_size, "127.0.0.1", port, "test")


def spawn(function: Callable[..., Any], world_size: int, *arguments: Any) -> list[Any]:
    """Calls function(world, device, *arguments) on `world_size` gloo ranks; their results in rank order.

    An exception on any rank fails the test with that rank's traceback.
    """
    # Forked from one clean process that has imported what takes seconds to import.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["crate_dist.train", "torch._dynamo"])
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_as_rank, args=(function, rank, world_size, port, folder, arguments))
            for rank in range(world_size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=300)
        hanging = [process for process in processes if process.is_alive()]
        for process in hanging:
            process.kill()
        results = []
        for rank, process in enumerate(processes):
            error = Path(folder, f"{rank}.error")
            assert not error.exists(), f"rank {rank} of {world_size}:\n{error.read_text()}"
            assert process not in hanging, f"rank {rank} of {world_size} did not end"
            assert process.exitcode == 0, f"rank {rank} of {world_size} ended with {process.exitcode}"
            results.append(torch.load(Path(folder, f"{rank}.pt"), weights_only=False))
        return results


def _as_rank(
    function: Callable[..., Any], rank: int, world_size: int, port: int, folder: str, arguments: tuple[Any, ...]
) -> None:
    import traceback

    os.environ.update(rank_environment(rank, world_size, port))
    torch.set_num_threads(1)
    world = local_world(rank, world_size, port)
    try:
        device = init_distributed(world)
        torch.save(function(world, device, *arguments), Path(folder, f"{rank}.pt"))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.error").write_text(traceback.format_exc())
        os._exit(1)  # the others may wait for this rank in a collective; do not wait for them in turn


class Training:
    """`python -m crate_dist.train …` on several ranks of this machine."""

    def __init__(self, arguments: Sequence[object], world_size: int) -> None:
        port = free_port()
        self._outputs = [tempfile.TemporaryFile("w+") for _ in range(world_size)]  # noqa: SIM115
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", "crate_dist.train", *map(str, arguments)],
                cwd=REPOSITORY,
                env={**os.environ, **rank_environment(rank, world_size, port)},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            for rank, output in enumerate(self._outputs)
        ]

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def wait(self, timeout_s: float = 300) -> list[int]:
        """The exit status of each rank."""
        return [process.wait(timeout_s) for process in self.processes]

    def output(self, rank: int = 0) -> str:
        """Returns what a rank has written so far."""
        self._outputs[rank].seek(0)
        return self._outputs[rank].read()

    def kill(self) -> None:
        """kill -9 for every rank and its loader workers."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def train_to_the_end(arguments: Sequence[object], world_size: int) -> str:
    """Runs the training; rank 0's output. Fails the test when a rank fails."""
    with Training(arguments, world_size) as run:
        for rank, status in enumerate(run.wait()):
            assert status == 0, f"rank {rank} of {world_size}:\n{run.output(rank)}"
        return run.output()
