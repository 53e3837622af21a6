"""Build the index for WebDataset shards that stand already."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # so that what a bare Python lacks is told by crate_dist
import crate_dist  # noqa: F401  isort: skip
import numpy as np

from crate_dist.data.index import ShardIndex
from crate_dist.prep.check import Classes, build_indexes, link_shards, split_folders
from crate_dist.prep.program import program_parser, run_program, tell, warn
from crate_dist.prep.tar import LabelRule
from crate_dist.wording import counted, size

EPILOG = """
example:
  python data_prep/index.py /data/shards                         DIR/train/*.tar and DIR/val/*.tar, or DIR/*.tar
  python data_prep/index.py /data/shards --label json:label --classes synset_words.txt
  python data_prep/index.py '/data/in1k-train-{000000..001281}.tar' --out /data/splits/train

  The last form makes a split of some of the shards in a folder: --out gets a link to each, and the index.

  Each sample needs one image (.jpg, .png, .webp ...) and its label as a whole number from 0 on: in a .cls file, or
  under a key of a .json file (json:meta.label goes a level deeper). The shards are read once and not changed;
  index.json and index.npy are written beside them. They must be plain .tar files, not compressed ones.

  --classes takes one class a line, in the order of the labels: an id, and after a tab a name for people. Without it
  the classes of an index that stands already are kept, or they are called 0, 1, 2 ... Shards that are not those of
  an index that stands are refused, since they may be damaged; --changed says that they were changed on purpose.
"""


def label_rule(text: str) -> LabelRule:
    """Reads cls or json:KEY; a type for argparse."""
    try:
        return LabelRule.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def describe(index: ShardIndex) -> None:
    """Tells what was found in a split."""
    total = sum(shard.bytes for shard in index.shards)
    tell(
        f"{index.root}: {counted(index.num_samples, 'sample')} in {counted(len(index.shards), 'shard')}, "
        f"{counted(index.num_classes, 'class', 'classes')}, {size(total)}"
    )
    per_class = np.bincount(index.rows["label"], minlength=index.num_classes)
    if empty := int((per_class == 0).sum()):
        hint = "; do the labels count from 1?" if per_class[0] == 0 and empty == 1 else ""
        warn(f"{index.root}: {counted(empty, 'class', 'classes')} without a sample{hint}")
    if len(index.shards) > 1 and all(len(np.unique(rows)) == 1 for rows in labels_of_shards(index)):
        warn(f"{index.root}: every shard holds a single class; such shards mix badly, write them anew from the images")


def labels_of_shards(index: ShardIndex) -> list[np.ndarray]:
    """Returns the labels of each shard that has samples."""
    return [labels for labels in np.split(index.rows["label"], np.cumsum(index.shard_sizes)[:-1]) if len(labels)]


def main() -> None:
    """Indexes."""
    parser = program_parser(__doc__, EPILOG)
    parser.add_argument(
        "shards", metavar="DIR|PATTERN", help="folder of shards, or of folders of shards; or shards as a brace pattern"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the split that a pattern makes")
    parser.add_argument(
        "--label",
        type=label_rule,
        default=LabelRule(),
        metavar="RULE",
        help="cls or json:KEY, of the labels [cls]",
    )
    parser.add_argument("--classes", type=Path, metavar="FILE", help="class ids and names, one a line")
    parser.add_argument("--changed", action="store_true", help="shards were added, removed or replaced on purpose")
    arguments = parser.parse_args()
    classes = Classes.read(arguments.classes) if arguments.classes else None
    if arguments.out:
        folders = [link_shards(arguments.shards, arguments.out.expanduser().absolute())]
    else:
        folders = split_folders(Path(arguments.shards).expanduser().absolute())
    for index in build_indexes(folders, arguments.label, classes, arguments.workers, arguments.changed):
        describe(index)


if __name__ == "__main__":
    sys.exit(run_program(main))
