"""Batches for training and for evaluation need no /dev/shm, of which a container may have 64 MB or none to speak of."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SHM_BYTES = 64 << 10

BATCHES_OF_BOTH = """
import itertools, sys
from crate_dist.data.feed import Feed
from crate_dist.data.index import ShardIndex
from crate_dist.data.loader import Share, TrainLoader, eval_loader
from crate_dist.data.order import Order
from crate_dist.data.transforms import EvalTransform, TrainTransform
import torch

try:
    open("/dev/shm/full", "wb", buffering=0).write(bytes(int(sys.argv[2])))
    open("/dev/shm/full", "ab", buffering=0).write(bytes(1))
except OSError:
    print("full")
index, cpu = ShardIndex.load(sys.argv[1]), torch.device("cpu")
training = TrainLoader(index, Order(index.shard_sizes, 0, 4, 16), Share(0, 1, 20, 20), TrainTransform(64), workers=2)
print(sum(len(batch.images) for batch in itertools.islice(Feed(training, cpu), 12)))
evaluation = eval_loader(index, 0, 1, EvalTransform(64, 64), 20, workers=2)
print(sum(len(batch.images) for batch in Feed(iter(evaluation), cpu)))
"""


ITS_OWN = ["unshare", "-m", "sh", "-c", f'mount -t tmpfs -o size={SHM_BYTES} shm /dev/shm && exec "$@"', "sh"]


def may_mount() -> bool:
    if os.getuid() != 0 or not shutil.which("unshare"):
        return False
    return subprocess.run([*ITS_OWN, "true"], check=False, capture_output=True).returncode == 0


@pytest.mark.skipif(not may_mount(), reason="needs root and unshare, to mount another /dev/shm")
def test_batches_are_made_where_shared_memory_is_full(cast_shards: Path) -> None:
    """Writing behind the end of that file system is a bus error, and the end of a worker."""
    program = [sys.executable, "-c", BATCHES_OF_BOTH, str(cast_shards / "train"), str(SHM_BYTES)]
    done = subprocess.run([*ITS_OWN, *program], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["full", "240", "200"], done.stderr
