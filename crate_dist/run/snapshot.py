"""The code of a run, kept in its folder: what was submitted is what runs, whatever becomes of the clone. No torch.

code/3f2a…/
    crate_dist/ configs/    as they stood in the clone, changed and new files too
    version.json            the commit, and whether anything differs from it
    changes.diff            what differs, as `git diff` says it, new files of the package too

The folder's name is the digest of all that is in it. A start writes its own from the clone that it was given in, and
takes one that is there only after it has compared every byte: what another has left in a run folder is not run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from crate_dist.errors import UserError

CLONE = Path(__file__).resolve().parents[2]
START = Path("crate_dist", "start.py")
"""The program, below a snapshot, that runs a module with its code."""

_KEPT = ("crate_dist", "configs")
_VERSION, _CHANGES = "version.json", "changes.diff"
_MOST_BYTES = 20_000_000
_MOST_OF_DIFF = 1_000_000
_NAME = re.compile(r"\.?[0-9a-f]{32}(\.\w+)?")


class CodeChanged(UserError):
    """A snapshot is not any more, or cannot be, what its name says."""


@dataclass(frozen=True)
class Snapshot:
    """The code of a clone at one moment, in memory.

    files: path in the snapshot -> what is in it
    """

    files: Mapping[str, bytes]

    @classmethod
    def take(cls, clone: Path = CLONE) -> Snapshot:
        """Reads the code of a clone. Raises CodeChanged when it is more than a run folder should hold."""
        files = {name: path.read_bytes() for kept in _KEPT for name, path in _files(clone, clone / kept)}
        if (size := sum(map(len, files.values()))) > _MOST_BYTES:
            largest = max(files, key=lambda name: len(files[name]))
            raise CodeChanged(
                f"{' and '.join(_KEPT)} in {clone} hold {size / 1e6:.0f} MB, of which each run keeps a copy, and "
                f"at most {_MOST_BYTES / 1e6:.0f} MB: {largest} alone is "
                f"{len(files[largest]) / 1e6:.1f}; move it elsewhere"
            )
        about = {"commit": code_facts(clone)["commit"], "changed": False}
        if changes := _changes(clone):
            files[_CHANGES] = changes
            about |= {"changed": True, "diff": hashlib.sha256(changes).hexdigest()[:32]}
        files[_VERSION] = (json.dumps(about) + "\n").encode()
        return cls(files)

    @cached_property
    def digest(self) -> str:
        """Of names and contents; the name of the folder."""
        return _digest(self.files)

    def write(self, code: Path) -> Path:
        """Puts it below a folder, unless it is there, and returns its path. Raises CodeChanged, OSError."""
        if code.is_symlink():
            raise CodeChanged(f"{code} is a symbolic link, which could lead anywhere: remove it")
        place = code / self.digest
        if place.is_symlink() or (place.exists() and not self._is_in(place)):
            place.rename(code / f".{self.digest}.{uuid.uuid4().hex}")  # `prune` takes it
        if not place.exists():
            beside = code / f".{self.digest}.{uuid.uuid4().hex}"
            for name, content in self.files.items():
                (path := beside / name).parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            try:
                beside.rename(place)
            except OSError:  # another start has just put it there
                shutil.rmtree(beside)
                if not self._is_in(place):
                    raise
        return place

    def _is_in(self, place: Path) -> bool:
        """Tells whether a folder holds this and nothing else, once what Python has compiled there is removed."""
        paths = [path for path in place.rglob("*") if path.is_symlink() or not path.is_dir()]
        found = {path.relative_to(place).as_posix(): path for path in paths}
        if any(path.is_symlink() for path in found.values()):
            return False
        compiled = {name for name in found if "__pycache__" in Path(name).parts}
        try:
            for name in compiled:
                found.pop(name).unlink(missing_ok=True)
            return found.keys() == self.files.keys() and all(
                path.read_bytes() == self.files[name] for name, path in found.items()
            )
        except OSError:
            return False


def prune(code: Path, used: Collection[str]) -> None:
    """Removes the snapshots in a run's own folder that are not among `used`. The caller holds the run's lock."""
    for path in code.iterdir():
        if _NAME.fullmatch(path.name) and path.name not in used and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


def check_unchanged(place: Path) -> None:
    """Raises CodeChanged when what a snapshot holds is not what its name says."""
    if _digest({name: path.read_bytes() for name, path in _files(place, place)}) != place.name:
        raise CodeChanged(
            f"the code in {place} is not what was submitted: it was changed, or is not whole; the same command, given "
            "again, starts with the code of the clone"
        )


def code_facts(root: Path) -> dict[str, Any]:
    """Returns the commit of the code in a folder (None outside a checkout), and whether it was changed since.

    Of a snapshot, those of its clone, and under "snapshot" its digest.
    """
    if _NAME.fullmatch(root.name) and (root / _VERSION).is_file():
        return {**json.loads((root / _VERSION).read_text(encoding="utf-8")), "snapshot": root.name}
    commit = (_git(root, "rev-parse", "HEAD") or b"").decode().strip() or None
    return {"commit": commit, "changed": bool(_git(root, "status", "--porcelain", "--untracked-files=no"))}


def _changes(clone: Path) -> bytes:
    """Returns what differs from the commit as one diff, with the new files of the package; cut where it is too long."""
    index = _git(clone, "rev-parse", "--git-path", "index")
    if index is None:
        return b""
    with tempfile.TemporaryDirectory() as folder:
        own = Path(folder) / "index"  # the clone's own stays as it is
        try:
            shutil.copyfile(clone / index.decode().strip(), own)
        except OSError:
            return b""
        environment = {"GIT_INDEX_FILE": str(own)}
        _git(clone, "add", "--intent-to-add", "--", *(name for name in _KEPT if (clone / name).is_dir()), **environment)
        plain = ("--no-ext-diff", "--no-textconv", "--no-color", "--relative")
        diff = _git(clone, "diff", *plain, "HEAD", "--", ".", **environment) or b""
    if len(diff) > _MOST_OF_DIFF:
        diff = diff[:_MOST_OF_DIFF] + f"\n[cut: {len(diff)} bytes in all]\n".encode()
    return diff


def _git(clone: Path, *arguments: str, **environment: str) -> bytes | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=clone, capture_output=True, timeout=20, env={**os.environ, **environment}
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _files(root: Path, folder: Path) -> Iterator[tuple[str, Path]]:
    """Yields the name below `root`, and the path, of each file that is code or belongs to it."""
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if name[0] != "." and name != "__pycache__")
        for name in sorted(names):
            if name[0] != "." and not name.endswith((".pyc", "~")):
                path = Path(place, name)
                yield path.relative_to(root).as_posix(), path


def _digest(files: Mapping[str, bytes]) -> str:
    hashed = hashlib.sha256()
    for name in sorted(files):
        hashed.update(f"{len(name)} {name} {len(files[name])} ".encode() + files[name])
    return hashed.hexdigest()[:32]
