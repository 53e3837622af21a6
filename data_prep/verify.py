"""Check shards against their index: presence, size, digest, rows; with --images decode every image too."""

from __future__ import annotations

import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # so that what a bare Python lacks is told by crate_dist
from crate_dist.data.index import INDEX_JSON, ShardError, ShardIndex
from crate_dist.prep.check import split_folders, verify_split
from crate_dist.prep.journal import read_conversion
from crate_dist.prep.parts import progress
from crate_dist.prep.program import program_parser, run_program, tell
from crate_dist.wording import counted, duration

EPILOG = """
example:
  python data_prep/verify.py /data/imagenet-shards               all splits in it
  python data_prep/verify.py /data/imagenet-shards/val --images

  Lists every shard that is not what its index says. The exit status is 1 when there is one. Remove damaged shards
  and give the command again that converted them: it writes only these.
"""


def verify(folder: Path, decode: bool, workers: int) -> bool:
    """Checks one split and tells the outcome. Returns whether it is sound."""
    started = time.monotonic()
    if read_conversion(folder) is not None and not (folder / INDEX_JSON).exists():
        for line in progress(folder.parent)[0]:
            tell(f"NOT FINISHED {folder}: {line}")
        tell(f"NOT FINISHED {folder}: the command that began to write these shards goes on when it is given again")
        return False
    try:
        index = ShardIndex.load(folder)
    except ShardError as error:
        tell(f"DAMAGED {folder}: {error}")
        return False
    damaged = 0
    for name, problem in verify_split(index, decode, workers):
        tell(f"DAMAGED {folder / name}: {problem}")
        damaged += 1
    state = f"{damaged:,} of them damaged" if damaged else "all sound"
    shards, samples = counted(len(index.shards), "shard"), counted(index.num_samples, "sample")
    tell(f"{folder}: {shards}, {samples}: {state}; {duration(time.monotonic() - started)}")
    if not index.has_checksums:
        tell(f"{folder}: no checksums of single images, so reads are not checked; data_prep/index.py adds them")
    return not damaged


def main() -> int:
    """Verifies. Returns the exit status."""
    parser = program_parser(__doc__, EPILOG)
    parser.add_argument("shards", type=Path, metavar="DIR", help="folder of shards, or of folders of shards")
    parser.add_argument("--images", action="store_true", help="decode every image")
    arguments = parser.parse_args()
    folders = split_folders(arguments.shards.expanduser().absolute())
    sound = [verify(folder, arguments.images, arguments.workers) for folder in folders]
    return 0 if all(sound) else 1


if __name__ == "__main__":
    sys.exit(run_program(main))
