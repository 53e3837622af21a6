"""Oxford Flowers 102 -> WebDataset shards with an index."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # so that what a bare Python lacks is told by crate_dist
from crate_dist.prep.archives import Download, add_any_digest, download_workspace
from crate_dist.prep.convert import convert
from crate_dist.prep.flowers import flowers
from crate_dist.prep.options import conversion_parser, parsed
from crate_dist.prep.program import run_program

EPILOG = """
the source is a folder with these in it, as https://www.robots.ox.ac.uk/~vgg/data/flowers/102/ has them:
  102flowers.tgz, or the folder jpg/ that it unpacks to;  imagelabels.mat;  setid.mat

example:
  python data_prep/flowers.py --source /data/downloads --out /data/flowers-shards

  Writes the published splits: train and val, 1,020 images each, and test, 6,149. With --join-val, train has the 2,040
  images of both, and val is the published test split. The files are checked by their published digests; images are
  copied byte for byte. With --short-side 256 training reads faster, at a small cost in accuracy.
"""


def main() -> None:
    """Converts."""
    parser = conversion_parser(__doc__, EPILOG)
    add_any_digest(parser)
    parser.add_argument("--join-val", action="store_true", help="train on train and val; the test images are val then")
    arguments, options = parsed(parser)
    with download_workspace(options.out, options.dry_run) as work:
        download = Download(options.source, work, arguments.any_digest)
        convert(flowers(download, options.list_options, arguments.join_val), options)


if __name__ == "__main__":
    sys.exit(run_program(main))
