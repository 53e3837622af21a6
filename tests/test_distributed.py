"""Who am I: torchrun, SLURM, or alone; on which device, and in which groups."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.distributed as dist

from crate_dist.distributed import TooFewGPUs, adopt, choose_device, host_group, set_timeout
from crate_dist.world import World, detect_world, expand_nodelist, is_first_start
from tests.ranks import REPOSITORY, spawn

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


def test_a_rank_counts_the_cores_of_its_task_or_its_share_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "7")
    assert detect_world(SLURM).cores == 7
    assert detect_world(TORCHRUN).cores == 32
    monkeypatch.delenv("SLURM_CPUS_PER_TASK")
    assert detect_world(SLURM).cores == 10  # of 64, for 6 tasks


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


def slurm_task(local_rank: int, tasks: int = 8) -> World:
    """A task of a step of `tasks` on one node."""
    place = {"SLURM_PROCID": str(local_rank), "SLURM_LOCALID": str(local_rank), "SLURM_NODEID": "0"}
    return detect_world(SLURM | place | {"SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_STEP_TASKS_PER_NODE": str(tasks)})


@pytest.mark.parametrize(
    ("visible", "devices"),
    [
        (8, [0, 1, 2, 3, 4, 5, 6, 7]),  # every task sees all
        (1, [0] * 8),  # --gpus-per-task=1: each its own
        (4, [0, 1, 2, 3, 0, 1, 2, 3]),  # --gpu-bind=closest: those of its half of the node
        (0, [None] * 8),
    ],
)
def test_a_task_takes_the_gpu_that_it_was_given(visible: int, devices: list[int | None]) -> None:
    assert [choose_device(slurm_task(rank), visible, {}).index for rank in range(8)] == devices


def test_more_ranks_than_gpus_are_refused_where_all_ranks_see_the_same() -> None:
    world = detect_world({**TORCHRUN, "LOCAL_WORLD_SIZE": "4", "LOCAL_RANK": "3"})
    assert choose_device(world, 4, {}) == torch.device("cuda", 3)
    for env in {}, {"CUDA_VISIBLE_DEVICES": "0", "TORCHELASTIC_RUN_ID": "1"}:
        with pytest.raises(TooFewGPUs, match=r"4 ranks on this node, but 1 GPU\(s\)"):
            choose_device(world, 1, env)
    # A script around each rank has shown it a GPU of its own.
    assert choose_device(world, 1, {"CUDA_VISIBLE_DEVICES": "GPU-8932f937"}) == torch.device("cuda", 0)


DEVICE = """
import json, os, sys
import torch
torch.cuda.is_available = lambda: {seen} > 0
torch.cuda.device_count = lambda: {seen}
torch.cuda.set_device = lambda device: None
from crate_dist import distributed
from crate_dist.world import detect_world
torch.distributed.rendezvous = lambda *a, **k: sys.exit(print(json.dumps(dict(os.environ))))
distributed.init_distributed(detect_world(), 1020, 3720)
"""


def environment_of_a_rank(seen: int, **given: str) -> dict[str, str]:
    """What libraries find in the environment of task 3 of 8 that sees so many GPUs, when it is about to join."""
    names = ("LOCAL_RANK", "RANK", "CUDA_VISIBLE_DEVICES")
    env = {name: value for name, value in os.environ.items() if name not in names and not name.startswith("TORCH_")}
    task = {**SLURM, "SLURM_PROCID": "3", "SLURM_LOCALID": "3"}
    done = subprocess.run(
        [sys.executable, "-c", DEVICE.format(seen=seen)],
        cwd=REPOSITORY,
        env={**env, **task, **given},
        stdout=subprocess.PIPE,
        check=True,
    )
    found: dict[str, str] = json.loads(done.stdout)
    return found


def test_libraries_are_told_the_number_of_the_device_and_times_above_the_watchdogs() -> None:
    own = environment_of_a_rank(seen=1)
    assert (own["RANK"], own["LOCAL_RANK"]) == ("3", "0")
    assert own["TORCH_FR_BUFFER_SIZE"] == "2000"
    assert own["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] == "3720"
    assert environment_of_a_rank(seen=8)["LOCAL_RANK"] == "3"
    on_cpu = environment_of_a_rank(seen=0, TORCH_NCCL_TRACE_BUFFER_SIZE="7", TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC="9")
    assert on_cpu["LOCAL_RANK"] == "3"
    assert "TORCH_FR_BUFFER_SIZE" not in on_cpu
    assert on_cpu["TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC"] == "9"


@pytest.mark.parametrize(("seen", "device"), [(1, "cuda"), (0, "cpu")])
def test_deepspeed_takes_the_device_that_torch_sees_by_whatever_name(seen: int, device: str) -> None:
    program = f"""
import os, sys, types
import torch
torch.cuda.is_available = lambda: {seen} > 0
torch.cuda.device_count = lambda: {seen}
sys.modules["pynvml"] = types.SimpleNamespace(nvmlInit=lambda: None, NVMLError=Exception)
import crate_dist.training.engine
from deepspeed.accelerator import get_accelerator
print(get_accelerator().device_name())
if {seen}:
    torch.cuda.get_device_properties = lambda device: types.SimpleNamespace(total_memory=5)
    print(get_accelerator().available_memory())
"""
    named = {**os.environ, "CUDA_VISIBLE_DEVICES": "MIG-377e0049-554c-540b-93c6-d0976f8426cb"}
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, env=named, stdout=subprocess.PIPE, text=True)
    assert done.stdout.split()[-1 - seen :] == [device, "5"][: 1 + seen]


def timeouts(world: World, device: torch.device) -> list[list[float]]:
    """The time-outs of the group of all, of one of ours and of one of a library, and again after a change."""
    library: Any = dist.new_group(range(world.world_size))
    groups: list[Any] = [dist.group.WORLD, host_group(), adopt(library)]
    found = []
    for _ in range(2):
        found.append([group._get_backend(device).options._timeout / datetime.timedelta(seconds=1) for group in groups])
        set_timeout(77.0)
    return found


@pytest.mark.spawn
def test_every_group_has_our_time_out() -> None:
    assert spawn(timeouts, 2) == [[[1800.0] * 3, [77.0] * 3]] * 2


@pytest.mark.gpu
def test_a_rank_joins_by_nccl_on_its_gpu_and_records_its_collectives() -> None:
    program = """
import pathlib, pickle, sys, tempfile, torch, torch.distributed as dist
from crate_dist.distributed import host_group, init_distributed
from crate_dist.training.flight_records import keep_flight_records
from crate_dist.world import detect_world
device = init_distributed(detect_world())
assert device == torch.device("cuda", 0) and dist.get_backend() == "nccl", device
dist.all_reduce(torch.ones(1, device=device))
dist.all_reduce(torch.ones(1), group=host_group())
torch.cuda.synchronize()
folder = pathlib.Path(tempfile.mkdtemp())
assert keep_flight_records(folder, 0) == ["gloo_rank_", "nccl_rank_"]
for library in "gloo", "nccl":
    entries = pickle.loads((folder / f"{library}_rank_0").read_bytes())["entries"]
    assert [entry["profiling_name"] for entry in entries] == [f"{library}:all_reduce"], entries
"""
    subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=True)
