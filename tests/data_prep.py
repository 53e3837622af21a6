"""Pictures, folders and programs for the tests of data preparation."""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import webdataset
from PIL import Image

from crate_dist.data.index import ShardIndex

REPO = Path(__file__).resolve().parents[1]
Sample = dict[str, bytes]


def picture(
    seed: int, size: tuple[int, int] = (24, 18), mode: str = "RGB", format: str = "JPEG", exif: int = 0
) -> bytes:
    """A small encoded image, different for every seed. exif: orientation tag, 0 for none."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize(size).convert(mode)
    tags = Image.Exif()
    if exif:
        tags[0x0112] = exif
    out = io.BytesIO()
    image.save(out, format=format, **({"exif": tags} if exif else {}))
    return out.getvalue()


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    """Files by their path below root."""
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    """A tar of files by their names; mode: as tarfile.open takes it."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def class_tree(root: Path, classes: int = 3, images: int = 8, size: tuple[int, int] = (24, 18)) -> Path:
    """root/c<class>/<image>.jpg."""
    names = [(c, i) for c in range(classes) for i in range(images)]
    return write_tree(root, {f"c{c}/{i}.jpg": picture(100 * c + i, size) for c, i in names})


def command(program: str, *arguments: object) -> list[str]:
    """The command that a user would type."""
    return [sys.executable, str(REPO / "data_prep" / program), *map(str, arguments)]


def run(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a program of data_prep to its end."""
    return subprocess.run(command(program, *arguments), capture_output=True, text=True, timeout=120, check=False)


def convert(program: str, source: Path, out: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Converts with one worker unless told otherwise, and expects success."""
    done = run(
        program, "--source", source, "--out", out, *(() if "--workers" in arguments else ("--workers", 1)), *arguments
    )
    assert done.returncode == 0, done.stderr
    return done


def refuse(program: str, *arguments: object, status: int = 1) -> str:
    """Runs a program that is to end with an error in plain words, and returns these."""
    done = run(program, *arguments)
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    return done.stderr


def fingerprint(root: Path) -> dict[str, str]:
    """Digest of every file below a folder, hidden ones too."""
    files = (Path(folder) / name for folder, _, names in os.walk(root) for name in names)
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def shards_only(files: dict[str, str]) -> dict[str, str]:
    """Those files of a fingerprint that training reads."""
    return {name: digest for name, digest in files.items() if name.endswith((".tar", "index.json", "index.npy"))}


def tars_of(out: Path) -> dict[str, str]:
    """Digest of every tar and of its rows: what sources of different layouts share."""
    return {name: digest for name, digest in shards_only(fingerprint(out)).items() if not name.endswith("json")}


def read_by_webdataset(split: Path) -> list[Sample]:
    """All samples of a split as webdataset itself reads them, in order."""
    urls = sorted(str(path) for path in split.glob("*.tar"))
    return list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))


def read_by_index(split: Path) -> Iterator[tuple[bytes, int]]:
    """(image, label) of all samples by the offsets of the index, in order."""
    index = ShardIndex.load(split)
    rows = iter(index.rows)
    for shard in index.shards:
        data = (split / shard.name).read_bytes()
        for _ in range(shard.samples):
            row = next(rows)
            yield data[row["offset"] : row["offset"] + row["size"]], int(row["label"])
