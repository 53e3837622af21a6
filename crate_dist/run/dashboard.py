"""Names what TensorBoard shows of a run, so that it sorts, and gives the address of its overview. Imports no torch.

Groups are numbered, since TensorBoard sorts them and opens the first two alone. It sorts the curves of a group as well,
capitals first: so what a run is there for comes before the rest of the overview, and is what "HParams" shows of a run.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from urllib.parse import quote, urlencode

from crate_dist.run.folder import RunFolder

Tag = Callable[[str], str]

_PORT = 6006  # TensorBoard's own
_OVERVIEW = {
    "train/loss": "Loss, train",
    "val/loss": "Loss, val",
    "train/top1": "Top-1, train",
    "val/top1": "Top-1, val",
    "val/ema_loss": "Loss, val, EMA",
    "val/ema_top1": "Top-1, val, EMA",
    "speed/data_wait_fraction": "data wait",
    "run/left_h": "hours left",
    "speed/images_per_s": "images per s",
    "train/lr": "learning rate",
    "speed/mfu": "model FLOPs utilisation",
    "run/restarts": "restarts",
    "goodput/restarts": "restarts",
}
_GROUPS = {
    "train": "2 training",
    "val": "2 training/val",
    "samples": "2 training/images",
    "speed": "3 speed",
    "images_per_s": "3 speed/images_per_s",
    "stragglers": "3 speed",
    "memory": "4 memory",
    "goodput": "5 goodput",
    "whitebox": "6 white box",
    "checkpoint": "7 checkpoints",
    "data": "8 data",
}
_LAYERS = "9 layer by layer"
_PINNED = ("train/loss", "val/loss", "train/top1", "val/top1", "speed/images_per_s", "run/left_h")


def tag(name: str) -> str:
    """Returns the name under which TensorBoard shows what metrics.jsonl calls `name`; an unknown one stays."""
    if name in _OVERVIEW:
        return f"1 overview/{_OVERVIEW[name]}"
    first, _, rest = name.partition("/")
    if first == "whitebox" and "/layer-" in rest:
        return f"{_LAYERS}/{rest}"
    return f"{_GROUPS[first]}/{rest}" if first in _GROUPS else name


def tags_of(folder: RunFolder) -> Tag:
    """Returns what names the curves of a run: `tag`; of a run that began without it, the names as they are."""
    return tag if folder.tensorboard == folder.path else str


def address(folder: RunFolder) -> str:
    """Returns the address of a TensorBoard on this machine with the overview pinned, and no smoothing.

    Smoothing bends what only counts, and shows an accuracy that no evaluation found.
    """
    named = tags_of(folder)
    pinned = [{"plugin": "scalars", "tag": named(name)} for name in _PINNED]
    query = {"pinnedCards": json.dumps(pinned, separators=(",", ":")), "smoothing": 0}
    return f"http://localhost:{_PORT}/?{urlencode(query, quote_via=quote)}#timeseries"


def how_to_watch(folder: RunFolder) -> tuple[str, str]:
    """Returns the command that shows the runs beside a folder, and the address to open then."""
    return f"tensorboard --logdir {shlex.quote(str(folder.path.parent))}", address(folder)
