"""Any tree of class folders -> WebDataset shards with an index."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # so that what a bare Python lacks is told by crate_dist
from crate_dist.prep.convert import convert
from crate_dist.prep.folders import image_folder
from crate_dist.prep.options import add_part, add_val_fraction, conversion_parser, parsed
from crate_dist.prep.program import run_program

EPILOG = """
the source is one of:
  DIR/<class>/<image>                            one training split; --val-fraction holds images out of it
  DIR/train/<class>/<image>, DIR/val/<class>/...  splits; instead of val also valid, validation or test

example:
  python data_prep/image_folder.py --source /data/flowers --out /data/flower-shards --val-fraction 0.1

  Images may lie in further folders below their class. A label is the position of the class folder's name in sorted
  order. Hidden files and files that are no images are passed over and counted. Symbolic links are followed within
  the source; those that lead out of it only with --follow-links.
"""


def main() -> None:
    """Converts."""
    parser = conversion_parser(__doc__, EPILOG)
    add_val_fraction(parser, "where the source has no validation split")
    add_part(parser)
    arguments, options = parsed(parser)
    source = image_folder(options.source, options.list_options, arguments.val_fraction, options.seed)
    convert(source, options)


if __name__ == "__main__":
    sys.exit(run_program(main))
