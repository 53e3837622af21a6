"""Places for the cluster's daemons: each node in Linux namespaces of its own, or all on the bare machine.

In namespaces a node has its own address, host name, process tree and shared memory, as a real one does: a rendezvous
at 127.0.0.1 fails, and a crash is one kill of the node's first process. All of them lie within one outer namespace,
whose first process lives as long as a pipe of this one stays open: however the tests end, nothing is left behind,
and two clusters on one machine never meet.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

# The host's /proc is still mounted when the shell reads its own process id from it: that is the id outside.
# An ignored SIGCHLD stays ignored over exec, so that the first process reaps orphans without lifting a finger.
_INIT = """
read -r pid _ < /proc/self/stat
trap '' CHLD
mount -t proc proc /proc
mount -t tmpfs shm /dev/shm
mount --bind "$1" /etc/hosts
hostname "$2"
ip link set lo up
echo "$pid"
exec cat
"""


class Namespace:
    """A machine within the machine: its own network, host name, mounts and processes.

    Parameters
    ----------
    hostname: of the new machine
    hosts: file that it sees as its /etc/hosts
    within: the namespace that it dies with; None: the machine's own
    """

    def __init__(self, hostname: str, hosts: Path, within: Namespace | None = None) -> None:
        # Not the mounts of `within`: its /proc does not know the process ids of this one.
        enter = within.enter("net", "pid") if within else []
        unshare = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--kill-child"]
        self._keeper = subprocess.Popen(
            [*enter, *unshare, "sh", "-ec", _INIT, "sh", str(hosts), hostname],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a Ctrl-C in the terminal is for the tests, which then close the pipe
        )
        assert self._keeper.stdout is not None
        assert self._keeper.stderr is not None
        answer = self._keeper.stdout.readline()
        if not answer:
            raise OSError(f"no namespaces for {hostname}: {self._keeper.stderr.read().strip()}")
        self.pid = int(answer)

    def enter(self, *kinds: str) -> list[str]:
        """The words before a command that let it run in there; `kinds` of namespaces, all unless given."""
        return ["nsenter", f"--target={self.pid}", *(f"--{kind}" for kind in kinds or ("net", "uts", "mount", "pid"))]

    def kill(self) -> None:
        """Ends every process in there at once, as a power cut would."""
        if self._keeper.poll() is None:
            os.kill(self.pid, signal.SIGKILL)
        self._keeper.communicate()


def make_bridge(outer: Namespace, address: str) -> None:
    """The network that the nodes are attached to, with `address` for the outer namespace itself."""
    _ip(outer, "link add br0 type bridge")
    _ip(outer, f"addr add {address}/24 dev br0")
    _ip(outer, "link set br0 up")


def attach(outer: Namespace, node: Namespace, link: str, address: str) -> None:
    """Connects a node to the bridge by `link`, which set_link cuts and heals."""
    # A dead node's link goes a moment after the node.
    subprocess.run([*outer.enter("net"), "ip", "link", "del", link], capture_output=True, check=False)
    # Named by its process id as seen from outside, so not from within the outer process namespace.
    _ip(outer, f"link add {link} type veth peer name eth0 netns {node.pid}")
    _ip(outer, f"link set {link} master br0 up")
    _ip(node, f"addr add {address}/24 dev eth0")
    _ip(node, "link set eth0 up")


def set_link(outer: Namespace, link: str, up: bool) -> None:
    """Plugs or unplugs a node's network cable."""
    _ip(outer, f"link set {link} {'up' if up else 'down'}")


def namespaces_work() -> bool:
    """Tells whether this user on this machine may build all that a cluster of namespaces needs."""
    hosts = Path("/etc/hosts")
    try:
        outer = Namespace("probe", hosts)
    except OSError:
        return False
    try:
        make_bridge(outer, "10.77.0.1")
        node = Namespace("probed", hosts, within=outer)
        attach(outer, node, "v0", "10.77.0.10")
    except (OSError, subprocess.CalledProcessError):
        return False
    finally:
        outer.kill()
    return True


def processes_with(environment: Mapping[str, str]) -> Iterator[int]:
    """Process ids on this machine, but this one's, that were started with all of these variables."""
    wanted = {f"{key}={value}".encode() for key, value in environment.items()}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                given = set((entry / "environ").read_bytes().split(b"\0"))
            except OSError:  # it ended, or is someone else's
                continue
            if wanted <= given:
                yield int(entry.name)


def parent(pid: int) -> int | None:
    """The process id of a process's parent; None when the process has ended."""
    try:
        return int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def kill_all(pids: Iterator[int] | Sequence[int]) -> None:
    """SIGKILL to each that still is there."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _ip(place: Namespace, words: str) -> None:
    subprocess.run([*place.enter("net"), "ip", *words.split()], check=True, capture_output=True)
