"""The daemons of the cluster: munged, MariaDB, slurmdbd and slurmctld on a login node, one slurmd per node."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.cluster import places, slurm_conf
from tests.cluster.places import Namespace
from tests.cluster.slurm_conf import Layout

PROGRAMS = (
    *("munged", "mariadbd", "mariadb", "mariadb-install-db", "slurmdbd", "sacctmgr", "slurmctld", "slurmd"),
    *("sbatch", "srun", "sacct", "ip"),
)
NODE_VARIABLE = "CRATE_TESTBED_NODE"
# Daemons are often not on the path of a user who is not root.
PATH = f"{os.environ.get('PATH', '')}:/usr/local/sbin:/usr/sbin:/sbin"


def missing_programs() -> list[str]:
    """Lists the programs that a cluster takes and that are not installed."""
    return [name for name in PROGRAMS if not shutil.which(name, path=PATH)]


def tail(log: Path, lines: int = 30) -> str:
    """The end of a log, headed by its name."""
    text = log.read_text(errors="replace") if log.is_file() else "(not there)"
    return "\n".join([f"--- {log}", *text.splitlines()[-lines:]])


class Daemons:
    """Starts and ends the processes of a cluster; knows where each of them runs."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.env = {**os.environ, "PATH": PATH, "SLURM_CONF": str(layout.folder / "etc" / "slurm.conf")}
        self._login: Namespace | None = None
        self._nodes: dict[str, Namespace] = {}
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def on_login_node(self, argv: Sequence[str | Path]) -> list[str]:
        """`argv` behind the words that run it on the login node.

        It keeps the machine's process ids, so that signals to it need no detour.
        """
        return [*(self._login.enter("net", "uts") if self._login else []), *map(str, argv)]

    def dead(self) -> list[str]:
        """Names of daemons that ended by themselves."""
        return [name for name, process in self._running.items() if process.poll() is not None]

    def report(self, *names: str) -> str:
        """The ends of these daemons' logs, of all unless named."""
        logs = self.layout.folder / "log"
        return "\n".join(tail(logs / f"{name}.log") for name in names or self._running)

    def start_login_node(self) -> None:
        """Starts all but the nodes, up to the point where accounting answers."""
        layout = self.layout
        self._write_files()
        if layout.isolated:
            self._login = Namespace(layout.control_host, layout.hosts_file)
            places.make_bridge(self._login, layout.control_address)
        self._start(
            "munged",
            *("munged", "--foreground", "--force", f"--socket={layout.munge_socket}"),
            f"--key-file={layout.folder}/etc/munge.key",
            f"--pid-file={layout.folder}/run/munged.pid",
            f"--seed-file={layout.folder}/run/munge.seed",
        )
        self._start_database()
        self._start("slurmdbd", "slurmdbd", "-D")
        self._wait_until_works("sacctmgr", "--noheader", "list", "cluster")
        self._run("sacctmgr", "--immediate", "--quiet", "add", "cluster", "onebox")
        self._start("slurmctld", "slurmctld", "-D")

    def start_node(self, name: str) -> None:
        """Starts a node, or its slurmd where that alone is missing."""
        node = self.layout.node(name)
        if self._login and name not in self._nodes:
            self._nodes[name] = Namespace(name, self.layout.hosts_file, within=self._login)
            places.attach(self._login, self._nodes[name], node.link, node.address)
        self._start(name, "slurmd", "-D", "-N", name)

    def crash_node(self, name: str) -> None:
        """SIGKILL to every process of the node."""
        if name in self._nodes:
            self._nodes.pop(name).kill()
        else:  # tasks know their node by SLURM's variable, slurmd and slurmstepd by the testbed's
            places.kill_all([*self._processes(NODE_VARIABLE, name), *self._processes("SLURMD_NODENAME", name)])
        self._running.pop(name).wait()

    def kill_slurmd(self, name: str) -> None:
        """SIGKILL to the node's slurmd alone."""
        pid = (self.layout.folder / "run" / f"slurmd-{name}.pid").read_text().strip()
        subprocess.run([*self._enter(name), "kill", "-KILL", pid], check=True)
        self._running.pop(name).wait()

    def set_cable(self, name: str, plugged: bool) -> None:
        """Unplugs or plugs in the node's network."""
        if not self._login:
            raise ValueError("nodes that share the machine's network cannot be cut off it")
        places.set_link(self._login, self.layout.node(name).link, plugged)

    def repair_node(self, name: str) -> None:
        """Plugs in and starts what was unplugged or killed."""
        if name in self._nodes:
            self.set_cable(name, plugged=True)
        if name not in self._running or self._running[name].poll() is not None:
            self.start_node(name)

    def stop(self) -> None:
        """Ends every process of the cluster, jobs included, and removes its folder."""
        if self._login:
            self._login.kill()  # and with it the nodes, their jobs, the daemons and the network
            for node in self._nodes.values():
                node.kill()
        else:
            for _ in range(20):  # until none is left that was started meanwhile
                running = list(self._processes())
                if not running:
                    break
                places.kill_all(running)
                time.sleep(0.05)
        for process in self._running.values():
            process.wait()
        self._login, self._nodes, self._running = None, {}, {}
        shutil.rmtree(self.layout.folder, ignore_errors=True)

    def _start(self, name: str, *argv: str) -> None:
        with (self.layout.folder / "log" / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                [*self._enter(name), *argv],
                env={**self.env, NODE_VARIABLE: name},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _enter(self, name: str) -> list[str]:
        place = self._nodes.get(name, self._login)
        # A namespace dies with this process; a bare daemon has to be told to.
        return place.enter() if place else ["setpriv", "--pdeathsig", "KILL"]

    def _run(self, *argv: str, check: bool = True) -> bool:
        done = subprocess.run(
            self.on_login_node(argv), env=self.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
        )
        if check and done.returncode:
            raise RuntimeError(f"`{' '.join(argv)}` ended with {done.returncode}:\n{done.stdout}{done.stderr}")
        return done.returncode == 0

    def _wait_until_works(self, *argv: str, timeout_s: float = 30) -> None:
        deadline = time.monotonic() + timeout_s
        while not self._run(*argv, check=bool(self.dead()) or time.monotonic() > deadline):
            time.sleep(0.05)

    def _processes(self, variable: str = "", value: str = "") -> Iterator[int]:
        wanted: Mapping[str, str] = {variable: value} if variable else {}
        return places.processes_with({"SLURM_CONF": self.env["SLURM_CONF"], **wanted})

    def _write_files(self) -> None:
        layout = self.layout
        for name in ("run", "etc", "log", "dev", "state/ctld", "state/mysql"):
            (layout.folder / name).mkdir(parents=True)
        for node in layout.nodes:
            (layout.folder / "state" / node.name).mkdir()
        etc = layout.folder / "etc"
        layout.hosts_file.write_text(slurm_conf.hosts_file(layout))
        devices = self._gpu_devices()
        (etc / "slurm.conf").write_text(slurm_conf.slurm_conf(layout))
        (etc / "gres.conf").write_text(slurm_conf.gres_conf(layout, devices))
        for name, content in (
            ("slurmdbd.conf", slurm_conf.slurmdbd_conf(layout).encode()),
            ("munge.key", secrets.token_bytes(128)),
        ):
            (etc / name).touch(mode=0o600)  # both daemons refuse files that others can read
            (etc / name).write_bytes(content)

    def _gpu_devices(self) -> list[Path]:
        """Character devices to pass for GPUs: copies of /dev/null, or what every machine has."""
        devices = [self.layout.folder / "dev" / f"gpu{number}" for number in range(self.layout.gpus)]
        try:
            for device in devices:
                os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        except PermissionError:
            return [Path("/dev") / name for name in ("null", "zero", "full", "random", "urandom")[: len(devices)]]
        return devices

    def _start_database(self) -> None:
        folder, user, port = self.layout.folder, self.layout.user, self.layout.database_port
        data, socket = f"{folder}/state/mysql", f"{folder}/run/mysql.sock"
        self._run(
            # --rpm: without it, as root, packaged files under /usr change their owner
            *("mariadb-install-db", "--no-defaults", "--rpm", f"--user={user}", f"--datadir={data}"),
            *("--auth-root-authentication-method=normal", "--skip-test-db", f"--tmpdir={folder}"),
        )
        self._start(
            "mariadbd",
            *("mariadbd", "--no-defaults", f"--user={user}", f"--datadir={data}", f"--socket={socket}"),
            *(f"--pid-file={folder}/run/mariadb.pid", "--bind-address=127.0.0.1", f"--port={port}"),
            *("--innodb-buffer-pool-size=32M", "--innodb-log-file-size=8M", "--innodb-flush-log-at-trx-commit=0"),
            *("--innodb-lock-wait-timeout=900", "--performance-schema=0", "--skip-log-bin"),
        )
        client = ("mariadb", "--no-defaults", "--user=root", f"--socket={socket}", "--execute")
        self._wait_until_works(*client, "select 1")
        grants = "".join(
            f"create user 'slurm'@'{host}' identified by 'slurm'; grant all on slurm_acct_db.* to 'slurm'@'{host}';"
            for host in ("127.0.0.1", "localhost")
        )
        self._run(*client, f"create database slurm_acct_db; {grants}")
