"""Judges faults: some may pass, so that the run is tried again, others need a person. Imports no torch.

The one place where this is decided. A fault that is wrongly thought to pass costs little: a job whose starts get no
further is ended by its batch script, slurm/batch.sh.
"""

from __future__ import annotations

import errno
import http.client
import re
import urllib.error
from collections.abc import Iterator
from typing import TypeVar

E = TypeVar("E", bound=BaseException)

DEVICE_FAULT = (
    "uncorrectable ECC error|uncorrectable NVLink error|hardware stack error|unspecified launch failure|"
    "over nvlink or a hardware error|CUDA error: unknown error|device.s. is/are busy or unavailable|"
    "no CUDA-capable device is detected|GPU has fallen off the bus|NVRM: Xid"
)
"""Regular expression, also of awk, of what a rank's log shows when its GPU is broken rather than the program.

The texts are CUDA's own; its watchdog threads may end the process before Python sees an error.
"""

_PASSING = frozenset(
    getattr(errno, name)
    for name in (
        *("EIO", "ESTALE", "ETIMEDOUT", "EREMOTEIO", "ENOLINK", "ECOMM", "EPROTO", "ENOLCK", "ENXIO", "ENODEV"),
        *("ENETDOWN", "ENETUNREACH", "ENETRESET", "EHOSTDOWN", "EHOSTUNREACH", "ENOTCONN", "ESHUTDOWN", "EPIPE"),
        *("ECONNRESET", "ECONNREFUSED", "ECONNABORTED", "EAGAIN", "EINTR", "EBUSY", "ENOMEM", "ENFILE", "ECANCELED"),
    )
    if hasattr(errno, name)
)
"""Answers of network file systems and their servers while they are ill. A missing file, a full disk, or no permission
is not among them."""

_PASSING_TYPES = ("AcceleratorError", "OutOfMemoryError", "DistError", "LostWorker")
"""torch's: of the device, of its memory (which another process may have taken), of the other ranks; our loader's."""

_PASSING_TEXTS = re.compile(
    r"DataLoader worker \(pid|Pin memory thread exited|/gloo/|Input/output error|Stale file handle|"
    r"CUDA (driver )?error|cuDNN error|CUDNN_STATUS|CUBLAS_STATUS|NCCL error|Triton Error \[CUDA\]|" + DEVICE_FAULT
)
_LASTING_TEXTS = re.compile(
    "no kernel image is available|driver version is insufficient|invalid device ordinal|Duplicate GPU detected"
)


def may_pass(error: BaseException) -> bool:
    """Tells whether the same run, started again, may well not meet this error: it, or what caused it, may pass."""
    return any(_passes(one) for one in _chain(error))


def judged(error: E) -> E:
    """Returns the same error, which now keeps what `may_pass` says of it: pickled, it will lose its causes."""
    error.crate_may_pass = may_pass(error)  # type: ignore[attr-defined]
    return error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _passes(error: BaseException) -> bool:
    verdict: bool | None = getattr(error, "crate_may_pass", None)
    if verdict is not None:
        return verdict
    text = str(error)
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _PASSING
    if numbers := re.findall(r"\[Errno (\d+)\]", text):  # of another process or rank, told as text
        return all(int(number) in _PASSING for number in numbers)
    if isinstance(error, OSError):  # a server's or a command's failure; what decodes images has subclasses of its own
        return isinstance(error, ConnectionError | TimeoutError) or type(error) in (OSError, urllib.error.URLError)
    if isinstance(error, http.client.HTTPException | MemoryError):
        return True
    if not isinstance(error, RuntimeError | ImportError) or _LASTING_TEXTS.search(text):
        return False
    return any(kind.__name__ in _PASSING_TYPES for kind in type(error).__mro__) or bool(_PASSING_TEXTS.search(text))
