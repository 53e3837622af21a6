"""ImageNet (ILSVRC2012) -> WebDataset shards with an index."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # so that what a bare Python lacks is told by crate_dist
from crate_dist.prep.convert import convert
from crate_dist.prep.ilsvrc import imagenet
from crate_dist.prep.options import add_part, conversion_parser, parsed
from crate_dist.prep.program import run_program

EPILOG = """
the source is found in any of these layouts, also mixed:
  DIR/train/n01440764/*.JPEG, DIR/val/n01440764/*.JPEG      class folders; also DIR/n01440764/*.JPEG
  DIR/ILSVRC/Data/CLS-LOC/{train,val}, LOC_val_solution.csv  as Kaggle packs it
  DIR/ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar,      as image-net.org packs it; the archives are
      ILSVRC2012_devkit_t12.tar.gz                           read in place and never unpacked

example:
  python data_prep/imagenet.py --source /data/ILSVRC2012 --out /data/imagenet-shards
  python data_prep/imagenet.py --source /data/ILSVRC2012 --out /data/imagenet-shards --part 3/16

  Writes /data/imagenet-shards/train/train-000000.tar ... and val/, each with index.json and index.npy beside.
  Labels are positions in the sorted list of wnids, as in torchvision. Plain JPEGs are copied byte for byte; CMYK
  JPEGs and the PNG named .JPEG become RGB JPEGs; EXIF rotation is not applied. With --short-side 256 the shards
  shrink several times and training reads faster, at a small cost in accuracy.
"""


def main() -> None:
    """Converts."""
    parser = conversion_parser(__doc__, EPILOG)
    parser.add_argument(
        "--splits", nargs="+", choices=("train", "val"), metavar="SPLIT", help="train, val [those that are there]"
    )
    add_part(parser)
    arguments, options = parsed(parser)
    source = imagenet(options.source, arguments.splits, options.list_options)
    convert(source, options)


if __name__ == "__main__":
    sys.exit(run_program(main))
