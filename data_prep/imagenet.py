"""ImageNet (ILSVRC2012), or ImageNet-21K -> WebDataset shards with an index."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # so that what a bare Python lacks is told by crate_dist
from crate_dist.data.index import ShardError
from crate_dist.prep.convert import convert
from crate_dist.prep.ilsvrc import imagenet
from crate_dist.prep.imagenet21k import add_options, is_edition, read_imagenet21k
from crate_dist.prep.options import add_part, conversion_parser, parsed
from crate_dist.prep.program import run_program

EPILOG = """
the source is found in any of these layouts, also mixed:
  DIR/train/n01440764/*.JPEG, DIR/val/n01440764/*.JPEG      class folders; also DIR/n01440764/*.JPEG
  DIR/ILSVRC/Data/CLS-LOC/{train,val}, LOC_val_solution.csv  as Kaggle packs it
  DIR/ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar,      as image-net.org packs it; the archives are
      ILSVRC2012_devkit_t12.tar.gz                           read in place and never unpacked
  winter21_whole/, winter21_whole.tar, fall11_whole.tar,     ImageNet-21K, or --edition 21k of its class tars or
      or a folder with one of them in it                     folders; data_prep/imagenet21k.py --help tells of it

example:
  python data_prep/imagenet.py --source /data/ILSVRC2012 --out /data/imagenet-shards
  python data_prep/imagenet.py --source /data/ILSVRC2012 --out /data/imagenet-shards --part 3/16
  python data_prep/imagenet.py --source /data/winter21_whole --out /data/imagenet21k-shards --val-per-class 50

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
    parser.add_argument(
        "--edition", choices=("1k", "21k"), help="of ImageNet [21k where the source is one that is published, else 1k]"
    )
    add_options(parser.add_argument_group("of ImageNet-21K"))
    add_part(parser)
    arguments, options = parsed(parser, archive=True)
    if (arguments.edition or ("21k" if is_edition(options.source) else "1k")) == "21k":
        refuse(arguments, "splits", "ImageNet-21K has one split; --val-per-class N holds a second one out")
        convert(read_imagenet21k(arguments, options), options)
    else:
        if not options.source.is_dir():
            raise ShardError(f"--source {options.source} is not a folder; give the folder that the images are in")
        of_21k = "is for ImageNet-21K; this source is read as ILSVRC2012, --edition 21k would read it as the other"
        refuse(arguments, "classes", of_21k)
        refuse(arguments, "val_per_class", of_21k)
        convert(imagenet(options.source, arguments.splits, options.list_options), options)


def refuse(arguments: argparse.Namespace, name: str, why: str) -> None:
    """Raises ShardError where an option was given that the edition does not have."""
    if getattr(arguments, name):
        raise ShardError(f"--{name.replace('_', '-')}: {why}")


if __name__ == "__main__":
    sys.exit(run_program(main))
