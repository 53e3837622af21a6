"""ImageNet-21K -> WebDataset shards with an index."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # so that what a bare Python lacks is told by crate_dist
from crate_dist.prep.convert import convert
from crate_dist.prep.imagenet21k import add_options, read_imagenet21k
from crate_dist.prep.options import add_part, conversion_parser, parsed
from crate_dist.prep.program import run_program

EPILOG = """
the source is one of these, or a folder with one of them in it:
  fall11_whole.tar                        as image-net.org packs it, 21,841 classes; read in place
  winter21_whole.tar, or the folder winter21_whole/ that winter21_whole.tar.gz unpacks to, 19,167 classes
  DIR/n00004475.tar ..., or DIR/n00004475/*.JPEG ...   its class tars, or what they unpack to

example:
  python data_prep/imagenet21k.py --source /data/winter21_whole --out /data/imagenet21k-shards --val-per-class 50
  python data_prep/imagenet21k.py --source /data/winter21_whole --out /data/imagenet21k-shards --part 3/16

  Labels are positions in the sorted list of wnids, or in --classes FILE, for a subset or an order of yours. A class
  without an image keeps its label. No validation split is published: without --val-per-class only train is written,
  and training takes --set data.val_split=. Names of classes are read from words.txt beside the images. CMYK JPEGs and
  PNGs named .JPEG become RGB JPEGs; all else is copied byte for byte, unless --short-side or --quality is given.
"""


def main() -> None:
    """Converts."""
    parser = conversion_parser(__doc__, EPILOG)
    add_options(parser)
    add_part(parser)
    arguments, options = parsed(parser, archive=True)
    convert(read_imagenet21k(arguments, options), options)


if __name__ == "__main__":
    sys.exit(run_program(main))
