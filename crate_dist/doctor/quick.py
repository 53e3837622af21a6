"""The stage "quick": what a start needs of this machine, in under a minute."""

from __future__ import annotations

import importlib
import importlib.metadata
import multiprocessing
import os
import socket
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from multiprocessing.synchronize import Event
from pathlib import Path

from crate_dist.data.workers import MOST_WORKERS
from crate_dist.distributed import init_distributed, leave_distributed
from crate_dist.doctor import basics
from crate_dist.doctor.machine import CLONE, torch_cuda, version
from crate_dist.doctor.nvidia import device_files, driver_version, is_older, oldest_driver, query_gpus, smi, xid_errors
from crate_dist.doctor.stage import Finding, Setting
from crate_dist.launching.ranks import visible_gpus
from crate_dist.network import source_address
from crate_dist.world import World

_MEET_S = 20
_KEPT_S = 10.0
"""Of the stage's time, for what comes behind a slow import."""
_FREE = 0.9


def examine(setting: Setting) -> Iterator[Finding]:
    """Makes all checks; one that fails to work is a finding as well."""
    for check in (_packages, _driver, _meet, _node, _gpus, _device, _nccl):
        try:
            yield from check(setting)
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            yield Finding(f"check of {check.__name__.strip('_')}", "did not work", "", "works", False, what[:300])


def _packages(setting: Setting) -> Iterator[Finding]:
    """Holds what is installed against what the project asks for, and imports what training imports."""
    from packaging.requirements import Requirement

    if (CLONE / "pyproject.toml").is_file():
        project = tomllib.loads((CLONE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        texts, python = project["dependencies"], project["requires-python"]
    else:
        about = importlib.metadata.metadata("crate-dist")
        texts, python = importlib.metadata.requires("crate-dist") or [], about["Requires-Python"]
    needed = [Requirement(text) for text in texts if "extra ==" not in text]
    needed.append(Requirement(f"python{python}"))
    found = {one.name: version(one.name) for one in needed} | {"python": sys.version.split()[0]}
    wrong = [
        f"{one.name} {found[one.name] or 'is missing'}" + (f", needed {one.specifier}" if found[one.name] else "")
        for one in needed
        if not found[one.name] or not one.specifier.contains(found[one.name], prereleases=True)
    ]
    note = f"{'; '.join(wrong)}: `make setup`, or `pip install -e .`" if wrong else ""
    yield Finding("packages", len(needed) - len(wrong), f"of {len(needed)} fit", "all", not wrong, note)
    for name in ("torch", "deepspeed", "crate_dist.train"):
        importlib.import_module(name)
    yield Finding("imports of a rank", "work", passed=True)


def _driver(setting: Setting) -> Iterator[Finding]:
    """Holds torch's CUDA against the driver."""
    driver, cuda, files = driver_version(), torch_cuda(), device_files()
    if not driver and not files:
        yield Finding("driver", "none", note="no GPU on this machine")
        return
    if not cuda:
        note = "this torch is built for CPUs: install the build for the GPUs, as torch's page on installing says"
        yield Finding("driver", driver, "", "a torch that can use it", False, note)
        return
    oldest = oldest_driver(cuda)
    fits = not (oldest and is_older(driver, oldest))
    note = f"torch is built with CUDA {cuda}: update the driver to {oldest}, or install a torch for an older CUDA"
    yield Finding(
        "driver", driver, "", f"{oldest or 'known'} or newer", fits or setting.device == "cuda", "" if fits else note
    )
    import torch

    if not torch.cuda.is_available():
        note = f"CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES')}; does nvidia-smi work here?"
        yield Finding("GPUs for torch", "none", "", "one or more", False, note)


def _meet(setting: Setting) -> Iterator[Finding]:
    """Lets two processes meet by the name of this host with gloo, as those that signal and save do between nodes."""
    yield basics.host_name()
    first = _met(setting)
    # A second time, since the port may have been taken by another program in between.
    yield _met(setting) if first.passed is False else first


def _met(setting: Setting) -> Finding:
    name = "two processes meet with gloo"
    with socket.socket() as probe:
        probe.bind(("", 0))
        port = int(probe.getsockname()[1])
    context, shown = multiprocessing.get_context("spawn"), os.environ.get("CUDA_VISIBLE_DEVICES")
    imported = [context.Event() for _ in range(2)]
    processes = [context.Process(target=_as_one_of_two, args=(n, port, imported[n]), daemon=True) for n in range(2)]
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # so that they meet with gloo
    try:
        for process in processes:
            process.start()
    finally:
        del os.environ["CUDA_VISIBLE_DEVICES"]
        if shown is not None:
            os.environ["CUDA_VISIBLE_DEVICES"] = shown
    began = time.monotonic()
    while not all(one.is_set() for one in imported) and all(process.exitcode is None for process in processes):
        if setting.left_s < _KEPT_S:
            for process in processes:
                process.kill()
            note = f"after {time.monotonic() - began:.0f} s they still import torch: a slow file system, or busy cores"
            return Finding(name, "left out", note=note)
        time.sleep(0.05)
    began = time.monotonic()
    for process in processes:
        process.join(max(0.1, began + min(_MEET_S, setting.left_s - 3) - time.monotonic()))
    ended = [process.exitcode for process in processes]
    well = ended == [0, 0]
    for process in processes:
        process.kill()
    note = (
        f"they ended with {ended[0]} and {ended[1]} (None: not at all): does gloo work between processes here? Does a "
        "firewall stand before its own ports? GLOO_SOCKET_IFNAME names another interface (see `ip address`)"
    )
    took = time.monotonic() - began
    return Finding(name, took, "s", f"within {_MEET_S} s", well, "" if well else note)


def _as_one_of_two(rank: int, port: int, imported: Event) -> None:
    import torch
    import torch.distributed as dist

    imported.set()
    host = socket.gethostname()
    host = host if source_address(host) else "127.0.0.1"  # a name that does not resolve is a finding of its own
    init_distributed(World(rank, 2, rank, 2, host, port, "slurm"), timeout_s=_MEET_S)
    total = torch.ones(1)
    dist.all_reduce(total)
    assert float(total) == 2
    leave_distributed()


def _node(setting: Setting) -> Iterator[Finding]:
    """Looks at what the ranks of this node share."""
    ranks, gpu = max(visible_gpus(), 1), setting.device == "cuda"
    yield basics.shared_memory(ranks)
    yield basics.room("disk for runs, here", Path("runs"), 10, "give --run-dir on another file system")
    cache = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or tempfile.gettempdir())
    yield basics.room("disk for what torch compiles", cache, 1, "set TORCHINDUCTOR_CACHE_DIR, or TMPDIR")
    yield basics.cores(ranks, MOST_WORKERS, binding=gpu)
    yield basics.memory(ranks if gpu else 0)
    yield basics.c_compiler(needed=gpu)
    yield basics.clock(Path.cwd())


def _gpus(setting: Setting) -> Iterator[Finding]:
    """Reads what the driver has noted of the GPUs, and who else uses them."""
    if setting.device == "cpu":
        return
    for gpu in query_gpus():
        errors = int(gpu.get("ecc.errors.uncorrected.volatile.total", 0))
        note = "its memory is failing: take the node out, and reset or replace the GPU" if errors else ""
        name = f"GPU {gpu.get('index')}, {gpu.get('name')}"
        yield Finding(f"{name}: memory errors", errors, "uncorrected", "0", not errors, note)
    xids = xid_errors()
    yield Finding("faults in the kernel's log", len(xids), "lines", "none", not xids, xids[-1] if xids else "")
    others = smi("--query-compute-apps=pid,used_memory", "--format=csv,noheader").splitlines()
    own = str(os.getpid())
    others = [line for line in others if line.split(",")[0] != own]
    yield Finding(
        "other programs on the GPUs", len(others), facts={"used": [line.split(",")[-1].strip() for line in others]}
    )


def _device(setting: Setting) -> Iterator[Finding]:
    """Computes something on every device, and looks how much of its memory is free."""
    import torch

    devices = [torch.device("cuda", n) for n in range(torch.cuda.device_count())] or [torch.device("cpu")]
    for device in devices if setting.device == "cuda" else [torch.device("cpu")]:
        left, right = torch.arange(256.0, device=device).reshape(16, 16), torch.eye(16, device=device)
        right_sum = float((left.bfloat16() @ right.bfloat16()).float().sum())
        facts = {}
        if device.type == "cuda":
            facts = {"capability": torch.cuda.get_device_capability(device), "built for": torch.cuda.get_arch_list()}
        exact = abs(right_sum - 32640) < 100
        said = "is right" if exact else f"sums to {right_sum:g}"
        yield Finding(f"a product on {device}", said, expected="sums to 32640", passed=exact, facts=facts)
        if device.type == "cuda":
            free, total = torch.cuda.mem_get_info(device)
            note = "another program holds it, or one that was killed: see nvidia-smi" if free < _FREE * total else ""
            yield Finding(
                f"memory of {device}", free / 1e9, "GB free", f"{_FREE:.0%} of {total / 1e9:.0f}", not note, note
            )


def _nccl(setting: Setting) -> Iterator[Finding]:
    """Sums over a group of one with NCCL: its library loads, and finds the device."""
    import torch
    import torch.distributed as dist

    if setting.device == "cpu":
        return
    store = dist.HashStore()
    dist.init_process_group("nccl", store=store, rank=0, world_size=1)
    total = torch.ones(1, device="cuda")
    dist.all_reduce(total)
    well, found = float(total) == 1, ".".join(map(str, torch.cuda.nccl.version()))
    dist.destroy_process_group()
    yield Finding("NCCL", found, "", "sums", well)
