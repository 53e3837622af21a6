"""The places of the cluster's daemons, and the configuration files that tell them so."""

from __future__ import annotations

import getpass
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Node:
    """One slurmd; `host` is the name that its machine has, `link` its network cable."""

    name: str
    link: str
    host: str
    address: str
    port: int


@dataclass(frozen=True)
class Layout:
    """All that the daemons must agree on."""

    folder: Path
    isolated: bool
    user: str
    control_host: str
    control_address: str
    control_port: int
    dbd_port: int
    database_port: int
    nodes: tuple[Node, ...]
    cpus: int
    gpus: int
    grace_s: int

    @property
    def munge_socket(self) -> Path:
        """The socket of munged."""
        return self.folder / "run" / "munge.socket"

    @property
    def hosts_file(self) -> Path:
        """/etc/hosts as isolated machines see it."""
        return self.folder / "etc" / "hosts"

    def node(self, name: str) -> Node:
        """The node of that name."""
        return next(node for node in self.nodes if node.name == name)


def plan(folder: Path, *, nodes: int, cpus: int, gpus: int, grace_s: int, isolated: bool) -> Layout:
    """Addresses and ports: fixed ones where the cluster has a network of its own, else what is free."""
    if isolated:
        control, host = "10.77.0.1", "login"
        ports = [16817, 16819, 13306] + [17000] * nodes
    else:
        control, host = "127.0.0.1", socket.gethostname().partition(".")[0]
        ports = _free_ports(3 + nodes)
    return Layout(
        folder=folder,
        isolated=isolated,
        user=getpass.getuser(),
        control_host=host,
        control_address=control,
        control_port=ports[0],
        dbd_port=ports[1],
        database_port=ports[2],
        nodes=tuple(
            Node(
                name=f"n{number}",
                link=f"v{number}",
                host=f"n{number}" if isolated else host,
                address=f"10.77.0.{10 + number}" if isolated else f"127.0.1.{10 + number}",
                port=port,
            )
            for number, port in enumerate(ports[3:])
        ),
        cpus=cpus,
        gpus=gpus,
        grace_s=grace_s,
    )


def slurm_conf(layout: Layout) -> str:
    """slurm.conf: three partitions on the same nodes.

    main      jobs of it are preempted with warning: USR2 at once, `grace_s` to act on it
    abrupt    preempted with none
    high      preempts both
    """
    folder, names = layout.folder, ",".join(node.name for node in layout.nodes)
    lines = [
        "ClusterName=onebox",
        f"SlurmctldHost={layout.control_host}({layout.control_address})",
        f"SlurmctldPort={layout.control_port}",
        f"SlurmUser={layout.user}",
        f"SlurmdUser={layout.user}",
        "AuthType=auth/munge",
        "CredType=cred/munge",
        # A requeued job starts again once its credential has expired: 120 s unless said otherwise.
        f"AuthInfo=socket={layout.munge_socket},cred_expire=5",
        f"StateSaveLocation={folder}/state/ctld",
        f"SlurmdSpoolDir={folder}/state/%n",
        f"SlurmctldPidFile={folder}/run/slurmctld.pid",
        f"SlurmdPidFile={folder}/run/slurmd-%n.pid",
        "LogTimeFormat=iso8601_ms",
        "SlurmdParameters=config_overrides",  # more cores than the machine has
        "MailProg=/bin/true",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SwitchType=switch/none",
        "MpiDefault=none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core",
        "SchedulerType=sched/backfill",
        "SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1",
        "GresTypes=gpu",
        "SlurmctldParameters=preempt_send_user_signal",
        "ReturnToService=2",
        "JobRequeue=1",
        "MinJobAge=3600",
        # Job ids of an earlier cluster must not come again: submitit would find its pickles.
        f"FirstJobId={int(time.time()) // 4 % 60_000_000}",
        "KillWait=5",
        "SlurmctldTimeout=30",
        "SlurmdTimeout=15",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "JobAcctGatherType=jobacct_gather/none",
        "JobCompType=jobcomp/none",
        # Without accounting, sacct and so submitit never learn that a job has ended.
        "AccountingStorageType=accounting_storage/slurmdbd",
        "AccountingStorageHost=127.0.0.1",
        f"AccountingStoragePort={layout.dbd_port}",
        f"AccountingStoragePass={layout.munge_socket}",
        "AccountingStorageTRES=gres/gpu",
        *(
            f"NodeName={node.name} NodeHostname={node.host} NodeAddr={node.address} Port={node.port} "
            f"CPUs={layout.cpus} Boards=1 SocketsPerBoard=1 CoresPerSocket={layout.cpus} ThreadsPerCore=1 "
            f"RealMemory=4096 Gres=gpu:{layout.gpus} State=UNKNOWN"
            for node in layout.nodes
        ),
        f"PartitionName=main Nodes={names} Default=YES MaxTime=60 DefaultTime=10 PriorityTier=1 "
        f"GraceTime={layout.grace_s}",
        f"PartitionName=abrupt Nodes={names} MaxTime=60 DefaultTime=10 PriorityTier=1 GraceTime=0",
        f"PartitionName=high Nodes={names} MaxTime=60 DefaultTime=10 PriorityTier=10 PreemptMode=OFF",
    ]
    return "\n".join(lines) + "\n"


def gres_conf(layout: Layout, devices: Sequence[Path]) -> str:
    """gres.conf: GPUs that are none. SLURM insists on character devices, and takes any."""
    names = ",".join(node.name for node in layout.nodes)
    return "".join(f"NodeName={names} Name=gpu File={device}\n" for device in devices)


def slurmdbd_conf(layout: Layout) -> str:
    """slurmdbd.conf, for the MariaDB beside it."""
    lines = [
        "AuthType=auth/munge",
        f"AuthInfo=socket={layout.munge_socket}",
        "DbdAddr=127.0.0.1",
        "DbdHost=localhost",
        f"DbdPort={layout.dbd_port}",
        f"SlurmUser={layout.user}",
        f"PidFile={layout.folder}/run/slurmdbd.pid",
        "StorageType=accounting_storage/mysql",
        "StorageHost=127.0.0.1",
        f"StoragePort={layout.database_port}",
        "StorageUser=slurm",
        "StoragePass=slurm",
        "StorageLoc=slurm_acct_db",
    ]
    return "\n".join(lines) + "\n"


def hosts_file(layout: Layout) -> str:
    """/etc/hosts as the nodes see it."""
    entries = [("127.0.0.1", "localhost"), (layout.control_address, layout.control_host)]
    entries += [(node.address, node.name) for node in layout.nodes]
    return "".join(f"{address} {name}\n" for address, name in entries)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for sock in sockets:
            sock.bind(("", 0))
        return [int(sock.getsockname()[1]) for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()
