"""Ranks on several machines find each other, also where a machine's own name means 127.0.1.1."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from crate_dist.network import interface_of, is_loopback, source_address
from crate_dist.run.exit_status import NEEDS_A_PERSON, TRY_AGAIN
from tests.cluster import places
from tests.cluster.places import Namespace
from tests.ranks import REPOSITORY, free_port, rank_environment

pytestmark = pytest.mark.spawn

JOIN = f"""
import os, sys
import torch
import torch.distributed as dist
from crate_dist import distributed
from crate_dist.run.faults import may_pass
from crate_dist.world import detect_world

distributed._FORMING_S = 4
world = detect_world()
if os.environ.get("DIES") == str(world.rank):
    distributed._form = lambda make: os.kill(os.getpid(), 9)
try:
    distributed.init_distributed(world, timeout_s=60)
    total = torch.tensor(world.rank + 1)
    dist.all_reduce(total)
    dist.all_reduce(total, group=distributed.host_group())
except Exception as error:
    print(error)
    sys.exit({TRY_AGAIN} if may_pass(error) else {NEEDS_A_PERSON})
print(total.item(), os.environ["GLOO_SOCKET_IFNAME"])
"""


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[list[Namespace]]:
    """Two machines n0 and n1 on one network, set up as Debian does: each calls itself 127.0.1.1."""
    if os.geteuid() or not places.namespaces_work():
        pytest.skip("network namespaces need root, and a kernel that has them")
    addresses = ["10.77.0.10", "10.77.0.11"]
    outer = Namespace("outer", Path("/etc/hosts"))
    try:
        places.make_bridge(outer, "10.77.0.1")
        inner = []
        for number, address in enumerate(addresses):
            hosts = tmp_path / f"hosts-{number}"
            names = [f"{'127.0.1.1' if n == number else other} n{n}" for n, other in enumerate(addresses)]
            hosts.write_text("\n".join(["127.0.0.1 localhost", *names, ""]))
            inner.append(Namespace(f"n{number}", hosts, within=outer))
            places.attach(outer, inner[-1], f"v{number}", address)
        yield inner
    finally:
        outer.kill()


def join(nodes: list[Namespace], variables: Mapping[str, str]) -> list[tuple[int, str]]:
    """Lets a rank on each node join the others; how each ended, and what it said."""
    ranks = [
        subprocess.Popen(
            [*node.enter(), sys.executable, "-c", JOIN],
            cwd=REPOSITORY,
            env={**os.environ, **rank_environment(rank, 2, 29500), "MASTER_ADDR": "n0", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        for rank, node in enumerate(nodes)
    ]
    said = [rank.communicate(timeout=120)[0] for rank in ranks]
    return [(rank.returncode, text) for rank, text in zip(ranks, said, strict=True)]


def test_the_way_to_another_machine_is_told_without_sending() -> None:
    assert source_address("127.0.1.1") == "127.0.0.1"
    assert source_address("no-such-host.invalid") is None
    assert interface_of("127.0.1.1") == interface_of("127.0.0.1") == "lo"
    assert interface_of("192.0.2.1") is None
    assert [is_loopback(address) for address in ("127.0.1.1", "::1", "10.0.0.1", "fe80::1%eth0")] == [
        True,
        True,
        False,
        False,
    ]


def test_ranks_meet_where_each_machine_calls_itself_127_0_1_1(nodes: list[Namespace]) -> None:
    assert join(nodes, {}) == [(0, "6 eth0\n"), (0, "6 eth0\n")]


def test_a_network_that_cannot_work_needs_a_person_at_the_first_start(nodes: list[Namespace]) -> None:
    loopback = {"GLOO_SOCKET_IFNAME": "lo"}
    ended = join(nodes, loopback)
    assert [status for status, _ in ended] == [NEEDS_A_PERSON, NEEDS_A_PERSON], ended
    for _, said in ended:
        assert "the ranks have met at n0:29500 and all live, but gloo cannot connect them over the interface lo" in said
    later = join(nodes, {**loopback, "CRATE_START": "2"})
    assert [status for status, _ in later] == [TRY_AGAIN, TRY_AGAIN], later


def test_a_rank_that_dies_while_the_others_connect_is_a_lost_one() -> None:
    port = free_port()
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", JOIN],
            cwd=REPOSITORY,
            env={**os.environ, **rank_environment(rank, 2, port), "DIES": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in range(2)
    ]
    assert [rank.wait(timeout=60) for rank in ranks] == [TRY_AGAIN, -9]
