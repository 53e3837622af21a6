"""A real SLURM cluster on this machine, driven as a user, an administrator and a power cut would.

As root, where the kernel lets it, each node is a set of namespaces (see places.py); else all nodes share the
machine's network and host name. Everything lies in one temporary folder and ends with it.
"""

from __future__ import annotations

import getpass
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from crate_dist.world import expand_nodelist
from tests.cluster import places
from tests.cluster.daemons import Daemons, missing_programs, tail
from tests.cluster.slurm_conf import plan

__all__ = ["Cluster", "ClusterError", "Job", "missing_programs", "wait_until"]

ENDED = frozenset({"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "OUT_OF_MEMORY", "TIMEOUT"})
"""Job states that nothing follows; NODE_FAIL and PREEMPTED are not among them, since a requeue follows."""
SICK = ("down", "drain", "fail")
"""Beginnings of the states of nodes that only an administrator's word ends."""


class ClusterError(Exception):
    """The cluster, or a job on it, did not get where it should; the message holds what the daemons said."""


@dataclass(frozen=True)
class Job:
    """A job as slurmctld knows it at this moment."""

    id: str
    state: str
    restarts: int
    nodes: str
    exit_code: str
    reason: str
    log: Path


class Cluster:
    """Nodes n0, n1, … with `cpus` cores and `gpus` GPUs that are none; a context manager.

    Parameters
    ----------
    isolated: nodes in namespaces of their own; None: where that works
    grace_s: seconds that a preempted job of partition main has after its signal
    """

    def __init__(
        self, nodes: int = 4, cpus: int = 8, gpus: int = 4, grace_s: int = 20, isolated: bool | None = None
    ) -> None:
        # Not below pytest's folder: the path of a socket has at most 107 characters.
        self.folder = Path(tempfile.mkdtemp(prefix="crate-slurm-"))
        if isolated is None:
            isolated = os.geteuid() == 0 and places.namespaces_work()
        self.layout = plan(self.folder, nodes=nodes, cpus=cpus, gpus=gpus, grace_s=grace_s, isolated=isolated)
        self.node_names = tuple(node.name for node in self.layout.nodes)
        self._daemons = Daemons(self.layout)

    def __enter__(self) -> Self:
        self.up()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.down()

    @property
    def isolated(self) -> bool:
        """True when each node has a network, a host name and processes of its own."""
        return self.layout.isolated

    @property
    def env(self) -> Mapping[str, str]:
        """The environment in which SLURM's programs find this cluster."""
        return self._daemons.env

    @property
    def setup_lines(self) -> tuple[str, ...]:
        """Shell lines that a job on several nodes needs here: nobody can look up the names of bare nodes."""
        return () if self.isolated else ("export MASTER_ADDR=127.0.0.1",)

    def up(self) -> None:
        """Starts everything and waits until all nodes are idle. Raises ClusterError, with nothing left running."""
        try:
            self._daemons.start_login_node()
            for node in self.node_names:
                self._daemons.start_node(node)
            self._until(self._all_idle, "idle nodes", timeout_s=60)
        except BaseException:
            self.down()
            raise

    def down(self) -> None:
        """Ends all jobs and daemons and removes the folder."""
        self._daemons.stop()

    # A user

    def command(self, argv: Sequence[str | Path]) -> list[str]:
        """`argv` behind the words that run it on the login node. Run it with `env`."""
        return self._daemons.on_login_node(argv)

    def run(
        self,
        argv: Sequence[str | Path],
        timeout_s: float = 60,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command on the login node, `env` added to the environment. Raises ClusterError if it fails."""
        done = subprocess.run(
            self.command(argv),
            env={**self.env, **(env or {})},
            cwd=cwd,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if check and done.returncode:
            words = " ".join(map(str, argv))
            raise ClusterError(f"`{words}` ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done

    def job(self, job_id: str) -> Job:
        """The job's state by slurmctld, which knows it at once; sacct lags and may be wrong for seconds."""
        text = self.run(["scontrol", "--oneliner", "show", "job", job_id]).stdout
        facts = dict(re.findall(r"(\w+)=(\S*)", text))
        return Job(
            id=job_id,
            state=facts["JobState"],
            restarts=int(facts["Restarts"]),
            nodes=facts.get("NodeList", ""),
            exit_code=facts["ExitCode"],
            reason=facts["Reason"],
            log=Path(facts.get("StdOut", "/dev/null")),
        )

    def excluded(self, job_id: str) -> set[str]:
        """The nodes that the job may not run on."""
        text = self.run(["scontrol", "--oneliner", "show", "job", job_id]).stdout
        listed = re.search(r" ExcNodeList=(\S+)", text)
        return set(expand_nodelist(listed[1])) if listed and listed[1] != "(null)" else set()

    def wait_for(self, job_id: str, *states: str, restarts: int = 0, timeout_s: float = 120) -> Job:
        """Waits until the job is in one of `states`, restarted at least `restarts` times.

        Raises ClusterError with the end of the job's log when it ended otherwise or the time is over.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            job = self.job(job_id)
            if job.state in states and job.restarts >= restarts:
                return job
            if job.state in ENDED or time.monotonic() > deadline:
                wanted = f"{' or '.join(states)} with {restarts} restarts within {timeout_s} s"
                raise ClusterError(
                    f"expected {wanted}, got {job}\n{tail(job.log)}\n{self._daemons.report('slurmctld')}"
                )
            time.sleep(0.2)

    # An administrator, and fate

    def set_state(self, node: str, state: str) -> None:
        """ "drain", "resume", or "down", which requeues the node's jobs at once."""
        self.run(["scontrol", "update", f"nodename={node}", f"state={state}", "reason=test"])

    def boot(self, node: str) -> None:
        """Starts a crashed node again, or its slurmd if that alone was killed."""
        self._daemons.start_node(node)

    def crash(self, node: str) -> None:
        """Ends every process of the node without warning, tasks included. SLURM notices in 30 s or so."""
        self._daemons.crash_node(node)

    def kill_daemon(self, node: str) -> None:
        """kill -9 to the node's slurmd alone; its tasks go on."""
        self._daemons.kill_slurmd(node)

    def cut(self, node: str) -> None:
        """Unplugs the node's network. Only where nodes are isolated."""
        self._daemons.set_cable(node, plugged=False)

    def heal(self, node: str) -> None:
        """Plugs it in again."""
        self._daemons.set_cable(node, plugged=True)

    def recover(self) -> None:
        """Cancels every job and brings every node back to idle, whatever happened to it: a fresh start for a test."""
        self.run(["scancel", f"--user={getpass.getuser()}"], check=False)
        for node in self.node_names:
            self._daemons.repair_node(node)
        self._until(self._all_idle, "idle nodes", timeout_s=90)

    def _all_idle(self) -> bool:
        states = dict(line.split() for line in self._sinfo("%N %T").splitlines())
        for node, state in states.items():
            if state.startswith(SICK):
                self.run(["scontrol", "update", f"nodename={node}", "state=resume"], check=False)
        return states == dict.fromkeys(self.node_names, "idle")

    def _sinfo(self, form: str) -> str:
        return self.run(["sinfo", "--noheader", "--Node", "--partition=main", f"--format={form}"], check=False).stdout

    def _until(self, condition: Callable[[], bool], what: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            dead = self._daemons.dead()
            if dead or time.monotonic() > deadline:
                why = f"{', '.join(dead)} ended" if dead else f"not within {timeout_s} s"
                raise ClusterError(f"no {what}: {why}; {self._sinfo('%N %T %E')}\n{self._daemons.report(*dead)}")
            time.sleep(0.1)


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 120) -> None:
    """Polls. Raises ClusterError when `what` has not come in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise ClusterError(f"no {what} within {timeout_s} s")
        time.sleep(0.1)
