"""What to type after a conversion: commands that work on these shards, however few they are."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from crate_dist.data.index import INDEX_JSON, ShardIndex

_PAPERS_BATCH = 2048
_RANKS = 8
"""Of a node, as launch/slurm.py has them if nothing else is said."""


def next_steps(out: Path) -> Iterator[str]:
    """Yields a line for each program that can be called on the splits in a folder."""
    if (out / "train" / INDEX_JSON).is_file():
        samples = ShardIndex.load(out / "train").num_samples
        batch = min(_PAPERS_BATCH, 1 << max(samples // 20, 1).bit_length() - 1)  # some twenty steps an epoch at least
        more = f" --data {shlex.quote(str(out))}"
        more += "" if batch == _PAPERS_BATCH else f" --set train.global_batch={batch}"
        more += "" if (out / "val" / INDEX_JSON).is_file() else " --set data.val_split="
        if batch >= _RANKS:
            size = "--arch crate_large --nodes 4" if batch == _PAPERS_BATCH else "--arch crate_tiny --nodes 1"
            yield f"next: python launch/slurm.py {size}{more}"
        yield f"{'  or' if batch >= _RANKS else 'next'}: python launch/local.py --arch crate_tiny{more}"
    yield f"check at any time: python data_prep/verify.py {shlex.quote(str(out))}"
