"""The cluster, one for the whole session; every test in this folder skips where SLURM is not installed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster.testbed import Cluster, missing_programs

PACKAGES = "slurmctld slurmd slurm-client munge slurmdbd mariadb-server iproute2"


def pytest_runtest_setup() -> None:
    """Skips here rather than in the fixture, so that the report has one line for all tests."""
    if missing_programs():
        pytest.skip(f"SLURM is not installed: apt-get install {PACKAGES}")


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[Cluster]:
    """Four nodes with 8 cores each, from the first test that asks for them to the end of the session."""
    with Cluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(running_cluster: Cluster) -> Iterator[Cluster]:
    """The cluster with all nodes idle and no job, whatever the test before did to it."""
    yield running_cluster
    running_cluster.recover()
