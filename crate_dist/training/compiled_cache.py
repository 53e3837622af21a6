"""Keeps what torch.compile made with the run, so that a restart on another node finds it, from one file.

torch's own folders of what it compiled hold hundreds of small files, with locks, which many nodes would write at the
same time to a file system that they share. They stay where torch has them, on the node; the run folder has one file for
each GPU of a node, written whole by one rank, that all ranks read.

Loading it runs what is in it. It is therefore signed with a key of the user's own, in the home directory, and one that
somebody else signed, such as that of a run folder which came from elsewhere, is not even opened.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import secrets
import sys
import tempfile
from pathlib import Path

import torch

from crate_dist.files import written_whole
from crate_dist.run.lock import Tenure
from crate_dist.world import World

logger = logging.getLogger(__name__)

_VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
_SIGNATURE_BYTES = hashlib.sha256().digest_size


class CompiledCache:
    """The file of this rank's device in a folder. Without one, or where it cannot be used, all is compiled anew.

    Does nothing where the user has named a folder of their own in TORCHINDUCTOR_CACHE_DIR.
    """

    def __init__(self, folder: Path, world: World, device: torch.device) -> None:
        self.file = folder / f"{device.type}-{device.index or 0}.signed"
        self._writes = world.rank == (world.local_rank if device.type == "cuda" else 0)
        self._own = _VARIABLE in os.environ

    def load(self) -> bool:
        """Hands torch what an earlier start compiled. Returns False when there is nothing, or it is not the user's."""
        if self._own:
            return False
        try:
            signed, key = self.file.read_bytes(), _key()
        except (OSError, RuntimeError):
            return False
        signature, content = signed[:_SIGNATURE_BYTES], signed[_SIGNATURE_BYTES:]
        if not hmac.compare_digest(signature, hmac.digest(key, content, "sha256")):
            logger.warning("%s is not used: it was written by another user, or is damaged", self.file)
            return False
        try:
            return torch.compiler.load_cache_artifacts(content) is not None
        except Exception as error:  # of another version of torch
            logger.info("%s is not used (%s: %s)", self.file, type(error).__name__, error)
            return False

    def save(self, tenure: Tenure) -> None:
        """Writes what this process has compiled or loaded, where it is the one that does so for its device.

        Raises LostTheRun when the folder is another job's.
        """
        if self._own or not self._writes or "torch._inductor" not in sys.modules:
            return
        try:
            made = torch.compiler.save_cache_artifacts()
            if made is None:
                return
            key = _key()
            tenure.check()
            self.file.parent.mkdir(exist_ok=True)
            with written_whole(self.file) as file:
                file.write(hmac.digest(key, made[0], "sha256"))
                file.write(made[0])
        except (OSError, RuntimeError) as error:  # the latter where there is no home directory
            logger.warning("what was compiled is not kept for the next start: %s", error)


def check_node_folder() -> None:
    """Gives torch a temporary folder where it cannot write into the user's; it opens one though nothing be compiled."""
    given = os.environ.get(_VARIABLE)
    try:
        if given:
            Path(given).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=given):
                return
    except OSError as error:
        os.environ[_VARIABLE] = tempfile.mkdtemp(prefix="torchinductor-")
        logger.warning("%s=%s cannot be written to (%s); %s is", _VARIABLE, given, error, os.environ[_VARIABLE])


def _key() -> bytes:
    """Returns the user's key, made at its first use. Raises OSError where the home directory cannot hold it."""
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "crate-dist" / "key"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with tempfile.NamedTemporaryFile(dir=path.parent) as file:  # readable for its owner alone
            file.write(secrets.token_bytes(32))
            file.flush()
            with contextlib.suppress(FileExistsError):  # another rank was first
                os.link(file.name, path)
    return path.read_bytes()
