"""Who am I: torchrun, SLURM, or alone."""

from __future__ import annotations

import pytest

from crate_dist.world import detect_world, expand_nodelist, is_first_start

SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "14",
    "SLURM_STEP_TASKS_PER_NODE": "8,6",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "n0",
    "MASTER_PORT": "1234",
}


def test_a_slurm_step_is_recognised() -> None:
    world = detect_world(SLURM)
    assert (world.rank, world.world_size, world.local_rank, world.local_world_size) == (9, 14, 1, 6)
    assert world.master_addr == "gpu07"
    assert world.launcher == "slurm"
    assert not world.is_main
    # Every rank of the job computes the same port, another job another one.
    other_rank = detect_world({**SLURM, "SLURM_PROCID": "0", "SLURM_NODEID": "0"})
    assert other_rank.master_port == world.master_port
    assert detect_world({**SLURM, "SLURM_JOB_ID": "4712"}).master_port != world.master_port
    # A requeued one does too: that the port was taken may be why.
    assert detect_world({**SLURM, "SLURM_RESTART_COUNT": "1"}).master_port != world.master_port


def test_torchrun_under_srun_is_torchrun() -> None:
    world = detect_world({**SLURM, **TORCHRUN})
    assert (world.rank, world.world_size, world.local_rank, world.local_world_size) == (3, 4, 1, 2)
    assert (world.master_addr, world.master_port, world.launcher) == ("n0", 1234, "torchrun")


def test_the_shell_of_an_allocation_is_one_process() -> None:
    shell = {key: value for key, value in SLURM.items() if "STEP" not in key}
    world = detect_world(shell)
    assert (world.rank, world.world_size, world.launcher) == (0, 1, "single process")


def test_a_rank_beyond_the_world_is_an_error() -> None:
    with pytest.raises(ValueError, match="rank 4 is not among 4 ranks"):
        detect_world({**TORCHRUN, "RANK": "4"})


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("n0", ["n0"]),
        ("n0,n1", ["n0", "n1"]),
        ("gpu[01-03,7]", ["gpu01", "gpu02", "gpu03", "gpu7"]),
        ("a[1-2]b,login", ["a1b", "a2b", "login"]),
        ("r[1-2]n[08-09]", ["r1n08", "r1n09", "r2n08", "r2n09"]),
    ],
)
def test_node_lists_expand_as_scontrol_expands_them(text: str, names: list[str]) -> None:
    assert expand_nodelist(text) == names


def test_only_a_first_start_starts_over() -> None:
    assert is_first_start({})
    assert is_first_start({"SLURM_RESTART_COUNT": "0", "CRATE_START": "1", "TORCHELASTIC_RESTART_COUNT": "0"})
    for name, count in ("SLURM_RESTART_COUNT", "1"), ("CRATE_START", "2"), ("TORCHELASTIC_RESTART_COUNT", "1"):
        assert not is_first_start({name: count})
