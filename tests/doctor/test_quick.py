"""What a node lacks is said before a start, with what would do; only what rules training out ends one."""

from __future__ import annotations

import errno
import logging
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from crate_dist import train
from crate_dist.config import Recipe, load_recipe
from crate_dist.doctor import basics, start
from crate_dist.doctor.nvidia import gpu_faults, is_older, oldest_driver
from crate_dist.run.exit_status import NEEDS_A_PERSON
from crate_dist.run.faults import may_pass
from crate_dist.run.folder import RunFolder
from crate_dist.training.out_of_memory import explanation
from crate_dist.world import World
from tests.launching import test_job

ALONE = World(0, 1, 0, 1, "127.0.0.1", 29500, "slurm")


def test_too_little_of_anything_is_said_with_what_would_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enormous = 10**6
    lacking = [
        basics.shared_memory(enormous),
        basics.memory(enormous),
        basics.cores(enormous, 8, binding=True),
        basics.room("disk", tmp_path, 1e9, "make room"),
        basics.room("disk", Path("/proc/no/such"), 0, "give another folder"),
    ]
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    lacking.append(basics.c_compiler(needed=True))
    assert all(finding.passed is False and finding.note and finding.expected for finding in lacking)
    assert "gcc missing" in str(lacking[-1].value)
    assert basics.c_compiler(needed=False).passed is None


def test_enough_of_everything_passes(tmp_path: Path) -> None:
    enough = [
        basics.shared_memory(1),
        basics.cores(1, 0, binding=True),
        basics.room("disk", tmp_path / "yet" / "to come", 0.001, ""),
        basics.clock(tmp_path),
    ]
    assert all(finding.passed and not finding.note for finding in enough)


def test_drivers_are_compared_by_number_and_not_by_text() -> None:
    assert is_older("470.256.02", than=oldest_driver("12.8"))
    assert not is_older("1000.1", than=oldest_driver("12.8"))
    assert not is_older("525.60.13", than=oldest_driver("12.8"))
    assert oldest_driver("99.0") == ""


@pytest.fixture
def unusable_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node with a GPU and a driver that is older than torch's CUDA; no machine of the tests has either."""
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(start, "device_files", lambda: [Path("/dev/nvidia3")])
    monkeypatch.setattr(start, "driver_version", lambda: "470.57.02")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="its GPU can be used")
@pytest.mark.usefixtures("unusable_gpu")
def test_a_driver_that_is_too_old_is_named_and_hidden_gpus_are_nobodys(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "driver 470.57.02 is too old" in start.unusable_device()
    assert "525.60 or newer" in start.unusable_device()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert start.unusable_device() == ""


@pytest.mark.spawn
@pytest.mark.skipif(torch.cuda.is_available(), reason="its GPU can be used")
def test_a_job_whose_node_has_gpus_that_torch_cannot_use_asks_for_a_person_and_names_the_node(tmp_path: Path) -> None:
    before = (
        "import os, torch; from pathlib import Path; from crate_dist.doctor import start; torch.version.cuda = '12.8'; "
        "start.device_files = lambda: [Path('/dev/nvidia3')]; start.driver_version = lambda: '470.57.02'; "
        "os.environ.pop('CUDA_VISIBLE_DEVICES', None)"
    )
    (only,) = test_job.start(tmp_path / "run", world_size=1, before=before)
    said, errors = only.communicate(timeout=60)
    assert only.returncode == NEEDS_A_PERSON, errors
    assert "crate-dist fault: rank 0 on node n7: NodeIsUnfit: the driver 470.57.02 is too old for torch" in said
    assert "Traceback" not in errors


def test_a_broken_device_is_tried_again_elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken() -> None:
        raise RuntimeError("No CUDA GPUs: no CUDA-capable device is detected")

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(start, "unusable_device", lambda: "there are GPUs and torch cannot use them")
    monkeypatch.setattr(torch.cuda, "init", broken)
    with pytest.raises(start.NodeIsUnfit, match="no CUDA-capable device is detected") as caught:
        start.look_before_start(tmp_path, ALONE)
    assert may_pass(caught.value)


@pytest.mark.usefixtures("unusable_gpu")
def test_a_torch_for_cpus_ends_a_job_that_asked_for_gpus_and_no_other(
    tmp_path: Path, small_recipe: Path, cast_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    asked = opened(tmp_path / "asked", small_recipe, cast_shards, "cluster.gpus_per_node=1")
    with pytest.raises(start.NodeIsUnfit, match="built for the CPU alone: install its build for CUDA") as caught:
        start.look_before_start(asked, ALONE)
    assert not may_pass(caught.value)
    start.look_before_start(opened(tmp_path / "none", small_recipe, cast_shards, "cluster.gpus_per_node=0"), ALONE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="its GPU can be used")
def test_a_job_that_asked_for_gpus_does_not_train_on_the_cpu_of_a_node_without(
    tmp_path: Path, small_recipe: Path, cast_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURMD_NODENAME", "n7")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    asked = opened(tmp_path, small_recipe, cast_shards, "cluster.gpus_per_node=2")
    with pytest.raises(
        start.NodeIsUnfit, match=r"asked for 2 GPU\(s\) of each node, and torch sees none on n7"
    ) as caught:
        start.look_before_start(asked, ALONE)
    assert not may_pass(caught.value)
    assert "--gpus-per-node 0 trains on the CPU" in str(caught.value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # as a set-up line may say
    start.look_before_start(asked, ALONE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="its GPU is used")
def test_ranks_without_a_scheduler_warn_where_they_leave_gpus_idle(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    train.warn_of_idle_gpus()
    assert not caplog.text
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    train.warn_of_idle_gpus()
    assert "TRAINING ON THE CPU, though 2 GPU(s) are to be seen" in caplog.text


def opened(tmp_path: Path, small_recipe: Path, cast_shards: Path, *settings: str) -> Path:
    folder = RunFolder(tmp_path / "run")
    folder.open(load_recipe(small_recipe, settings, data__root=cast_shards))
    return folder.path


def test_what_training_could_live_with_is_a_warning(
    tmp_path: Path,
    small_recipe: Path,
    cast_shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = opened(tmp_path, small_recipe, cast_shards)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(basics.shutil, "disk_usage", full)
        start.look_before_start(run, ALONE)
    assert "run folder: No space left on device" in caplog.text


def test_a_fault_of_this_node_ends_a_start_only_where_it_may_be_left_for_another(
    tmp_path: Path,
    small_recipe: Path,
    cast_shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = opened(tmp_path, small_recipe, cast_shards)
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() + 3600)
    with caplog.at_level(logging.WARNING):
        start.look_before_start(run, ALONE)
    assert "clock, to that of the file system: -3,600." in caplog.text
    monkeypatch.setenv("CRATE_MAY_LEAVE_NODES", "yes")
    with pytest.raises(start.NodeIsAtFault, match=r"clock, to that of the file system: -3,600\."):
        start.look_before_start(run, ALONE)


def test_data_that_are_nowhere_are_no_fault_of_a_node_but_those_that_were_there_are(
    tmp_path: Path, small_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = opened(tmp_path, small_recipe, tmp_path / "not mounted")
    monkeypatch.setenv("CRATE_MAY_LEAVE_NODES", "yes")
    start.look_before_start(run, ALONE)
    with pytest.raises(start.NodeIsAtFault, match="not mounted here"):
        start.look_before_start(run, replace(ALONE, world_size=2))  # of a node more, which may see them
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with pytest.raises(start.NodeIsAtFault, match="is it mounted"):
        start.look_before_start(run, ALONE)


SMI = """#!/bin/sh
echo "$@" >> {folder}/asked
case "$1" in
    --query-gpu=*) printf '00000000:1A:00.0, 0\\n00000000:3B:00.0, {ecc}\\n00000000:5C:00.0, [N/A]\\n' ;;
    *) printf '00000000:1A:00.0, {pending}, {failure}\\n00000000:3B:00.0, No, No\\n' ;;
esac
"""
XIDS = """#!/bin/sh
echo "[{now}.123456] NVRM: Xid (PCI:0000:3b:00): 31, pid=7, MMU Fault: a program's own"
echo "[{now}.123456] NVRM: Xid (PCI:0000:ff:00): 79, pid=7, GPU has fallen off the bus: another job's"
echo "[{long_ago}.123456] NVRM: Xid (PCI:0000:3b:00): 79, pid=7, GPU has fallen off the bus: long ago"
echo "[{now}.123456] NVRM: Xid (PCI:0000:3b:00): {xid}, pid=7, …"
"""


@pytest.mark.parametrize(
    ("ecc", "pending", "failure", "xid", "expected"),
    [
        ("0", "0", "0", "13", []),
        ("2", "0", "0", "13", ["GPU 00000000:3B:00.0: 2 errors in its memory that were not corrected"]),
        ("0", "Yes", "0", "13", ["GPU 00000000:1A:00.0: broken memory waits for a reset to be replaced"]),
        ("0", "0", "1", "13", ["GPU 00000000:1A:00.0: broken memory could not be replaced"]),
        ("0", "0", "0", "79", ["NVRM: Xid (PCI:0000:3b:00): 79, pid=7, …"]),
    ],
)
def test_gpus_are_at_fault_by_what_the_driver_says_of_them_and_of_late(
    ecc: str, pending: str, failure: str, xid: str, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = int(time.monotonic())
    said = SMI.format(folder=tmp_path, ecc=ecc, pending=pending, failure=failure)
    for name, text in (("nvidia-smi", said), ("dmesg", XIDS.format(now=now, long_ago=now - 7200, xid=xid))):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    faults = gpu_faults()
    assert len(faults) == len(expected)
    assert all(wanted in fault for wanted, fault in zip(expected, faults, strict=True))
    assert (tmp_path / "asked").read_text().count("--id=0,1,2") == 2


def test_a_file_system_that_does_not_answer_holds_a_start_up_for_seconds_only(
    tmp_path: Path,
    small_recipe: Path,
    cast_shards: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(start, "PATIENCE_S", 0.2)
    monkeypatch.setattr(basics, "clock", lambda *_: time.sleep(3))
    began = time.monotonic()
    start.look_before_start(opened(tmp_path, small_recipe, cast_shards), ALONE)
    assert time.monotonic() - began < 2
    assert "does a file system hang?" in caplog.text


def test_a_step_without_room_names_a_micro_batch_that_fits_and_keeps_the_global_batch() -> None:
    recipe: Recipe = load_recipe("crate_base", data__root="/data")
    said = explanation(recipe, micro_batch=256, world_size=8, available_gb=20, total_gb=80)
    assert "a micro-batch of 256 images" in said
    assert "other programs hold 60.0" in said
    assert "--set train.micro_batch=" in said
    fits = int(said.partition("train.micro_batch=")[2].split()[0])
    assert recipe.train.global_batch // 8 % fits == 0
    assert fits < 256
    assert f"the global batch stays {recipe.train.global_batch}" in said
    # an estimate that is too low still leads to less
    assert "train.micro_batch=128 " in explanation(recipe, 256, 8, available_gb=800, total_gb=800)
    assert "not even one image" in explanation(recipe, 1, 8, available_gb=0.1, total_gb=80)
