"""Oxford-IIIT Pet -> WebDataset shards with an index."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # so that what a bare Python lacks is told by crate_dist
from crate_dist.prep.archives import Download, add_any_digest, download_workspace
from crate_dist.prep.convert import convert
from crate_dist.prep.options import add_val_fraction, conversion_parser, parsed
from crate_dist.prep.pets import pets
from crate_dist.prep.program import run_program

EPILOG = """
the source is a folder with these in it, as https://www.robots.ox.ac.uk/~vgg/data/pets/ has them:
  images.tar.gz, or images/;  annotations.tar.gz, or annotations/

example:
  python data_prep/pets.py --source /data/downloads --out /data/pet-shards

  Writes train, the 3,680 images of trainval.txt, and val, the 3,669 of test.txt. With --val-fraction 0.1 val is held
  out of the training images, and the test images are test. Classes are the 37 breeds. The archives are checked by
  their published digests; plain JPEGs are copied byte for byte, the few images of other formats become JPEGs.
"""


def main() -> None:
    """Converts."""
    parser = conversion_parser(__doc__, EPILOG)
    add_any_digest(parser)
    add_val_fraction(parser, "the test images are test then")
    arguments, options = parsed(parser)
    with download_workspace(options.out, options.dry_run) as work:
        download = Download(options.source, work, arguments.any_digest)
        source = pets(download, options.list_options, arguments.val_fraction, options.seed)
        convert(source, options)


if __name__ == "__main__":
    sys.exit(run_program(main))
