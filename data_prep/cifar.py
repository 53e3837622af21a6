"""CIFAR-10 or CIFAR-100 -> WebDataset shards with an index."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # so that what a bare Python lacks is told by crate_dist
from crate_dist.prep.archives import Download, add_any_digest, download_workspace
from crate_dist.prep.cifar import cifar
from crate_dist.prep.convert import convert
from crate_dist.prep.options import add_val_fraction, conversion_parser, parsed
from crate_dist.prep.program import run_program

EPILOG = """
the source is one of these, or a folder with one of them in it, as https://www.cs.toronto.edu/~kriz/cifar.html has them:
  cifar-10-python.tar.gz,  or cifar-10-batches-py/       cifar-100-python.tar.gz, or cifar-100-python/
  cifar-10-binary.tar.gz,  or cifar-10-batches-bin/      cifar-100-binary.tar.gz, or cifar-100-binary/

example:
  python data_prep/cifar.py --source cifar-10-python.tar.gz --out /data/cifar10-shards

  Writes train, 50,000 images, and val, the published 10,000 test images. With --val-fraction 0.1 val is held out of
  the training images, and the test images are test. Images are PNGs with the published pixels; --quality makes
  them JPEGs. All four kinds of files are checked by their published digests as far as there are any, and give the
  same shards. The pickles in the Python editions are read without running anything in them.
"""


def main() -> None:
    """Converts."""
    parser = conversion_parser(__doc__, EPILOG)
    add_any_digest(parser)
    add_val_fraction(parser, "the test images are test then")
    parser.add_argument("--dataset", choices=("10", "100"), help="where the source holds both")
    parser.add_argument("--coarse", action="store_true", help="CIFAR-100: its 20 superclasses as classes")
    arguments, options = parsed(parser, lossless=True, archive=True)
    with download_workspace(options.out, options.dry_run) as work:
        download = Download(options.source, work, arguments.any_digest)
        source = cifar(download, arguments.dataset, arguments.coarse, arguments.val_fraction, options.seed)
        convert(source, options)


if __name__ == "__main__":
    sys.exit(run_program(main))
