"""Ranks on several machines find each other, also where a machine's own name means 127.0.1.1."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
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

distributed._FORMING_S = 0.5
world = detect_world()
if os.environ.get("DIES") == str(world.rank):
    distributed._form = lambda make: os.kill(os.getpid(), 9)
try:
    distributed.init_distributed(world, timeout_s=60)
    total = torch.tensor(world.rank + 1)
    dist.all_reduce(total)
    dist.all_reduce(total, group=distributed.host_group())
    distributed.leave_distributed()
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


def join(nodes: Sequence[Namespace | None], **variables: str) -> list[tuple[int, str]]:
    """Lets a rank on each node join the others, or on this machine; how each ended, and what it said."""
    port = free_port()
    ranks = [
        subprocess.Popen(
            [*(node.enter() if node else []), sys.executable, "-c", JOIN],
            cwd=REPOSITORY,
            env={**os.environ, **rank_environment(rank, 2, port), **variables},
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
    assert all(map(is_loopback, ("127.0.1.1", "::1")))
    assert not any(map(is_loopback, ("10.0.0.1", "fe80::1%eth0")))


def test_ranks_meet_where_each_machine_calls_itself_127_0_1_1(nodes: list[Namespace]) -> None:
    assert join(nodes, MASTER_ADDR="n0") == [(0, "6 eth0\n"), (0, "6 eth0\n")]


def test_a_network_over_which_the_ranks_cannot_connect_needs_a_person(nodes: list[Namespace]) -> None:
    ended = join(nodes, MASTER_ADDR="n0", GLOO_SOCKET_IFNAME="lo")
    assert [status for status, _ in ended] == [NEEDS_A_PERSON, NEEDS_A_PERSON], ended
    for _, said in ended:
        assert "all live, but gloo cannot connect them over the interface lo" in said


@pytest.mark.parametrize(("start", "status"), [("1", NEEDS_A_PERSON), ("2", TRY_AGAIN)])
def test_an_interface_that_is_not_there_needs_a_person_unless_it_has_been(start: str, status: int) -> None:
    ended = join([None, None], GLOO_SOCKET_IFNAME="none0", CRATE_START=start)
    assert [ended for ended, _ in ended] == [status, status], ended


def test_a_rank_that_dies_while_the_others_connect_is_a_lost_one() -> None:
    assert [status for status, _ in join([None, None], DIES="1")] == [TRY_AGAIN, -9]
