"""Starts several ranks on this machine, for tests of what only happens between processes."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from crate_dist.distributed import exit_at_once, init_distributed
from crate_dist.run.folder import RunFolder
from crate_dist.world import World, free_port

REPOSITORY = Path(__file__).resolve().parents[1]

_CONTEXT = multiprocessing.get_context("forkserver")  # one clean process that has imported what takes seconds to import
_CONTEXT.set_forkserver_preload(["crate_dist.train", "torch._dynamo"])


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
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            _CONTEXT.Process(target=_as_rank, args=(function, rank, world_size, port, folder, arguments))
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
    """Ranks of this machine, each `python -m crate_dist.train …` in all but the imports, which take seconds."""

    def __init__(self, arguments: Sequence[object], world_size: int) -> None:
        port = free_port()
        self._folder = tempfile.TemporaryDirectory()
        self._outputs = [Path(self._folder.name, f"{rank}.txt") for rank in range(world_size)]
        self._processes = [
            _CONTEXT.Process(
                target=_train,
                args=([*map(str, arguments)], {**os.environ, **rank_environment(rank, world_size, port)}, output),
            )
            for rank, output in enumerate(self._outputs)
        ]
        for process in self._processes:
            process.start()

    def __enter__(self) -> Training:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def wait(self, timeout_s: float = 300) -> list[int]:
        """The exit status of each rank."""
        for rank, process in enumerate(self._processes):
            process.join(timeout_s)
            assert process.exitcode is not None, f"rank {rank} did not end:\n{self.output(rank)}"
        return [process.exitcode or 0 for process in self._processes]

    def output(self, rank: int = 0) -> str:
        """Returns what a rank has written so far."""
        return self._outputs[rank].read_text() if self._outputs[rank].exists() else ""

    def kill(self) -> None:
        """kill -9 for every rank and its loader workers."""
        for process in self._processes:
            assert process.pid
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()  # one that has just been forked leads no group yet
            process.join()


def _train(arguments: list[str], environment: dict[str, str], output: Path) -> None:
    from crate_dist import train

    os.setsid()
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(REPOSITORY)
    os.environ.clear()
    os.environ.update(environment)
    exit_at_once(partial(train.main, arguments))


def train_to_the_end(arguments: Sequence[object], world_size: int) -> str:
    """Runs the training; rank 0's output. Fails the test when a rank fails."""
    with Training(arguments, world_size) as run:
        for rank, status in enumerate(run.wait()):
            assert status == 0, f"rank {rank} of {world_size}:\n{run.output(rank)}"
        return run.output()
