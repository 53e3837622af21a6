"""Errors that may pass are tried again, wherever they happened and however they travelled; others are not."""

from __future__ import annotations

import errno
import os
import pickle
import urllib.error

import pytest
import torch
import torch.distributed as dist
from PIL import UnidentifiedImageError

from crate_dist.checkpoint.format import CheckpointError
from crate_dist.config import RecipeError
from crate_dist.data.index import ShardError
from crate_dist.run.faults import judged, may_pass
from crate_dist.training.engine import NotFinite


def os_error(number: int) -> OSError:
    """As the system raises it."""
    return OSError(number, os.strerror(number), "/data/train-000001.tar")


def caused(error: Exception, cause: BaseException) -> Exception:
    """`raise error from cause`."""
    error.__cause__ = cause
    return error


WORKER = "Caught OSError in DataLoader worker process 0.\nOriginal Traceback …\nOSError: [Errno {}] …: '/data/x'"
ECC = "CUDA error: uncorrectable ECC error encountered\nCUDA kernel errors might be asynchronously reported"


@pytest.mark.parametrize(
    "error",
    [
        *(os_error(number) for number in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.ENOMEM)),
        caused(ShardError("cannot read /data/train-000001.tar"), os_error(errno.EIO)),
        caused(ShardError("cannot fetch"), urllib.error.URLError(ConnectionRefusedError(111, "refused"))),
        caused(ShardError("cannot fetch"), OSError("HTTP status 503 Service Unavailable")),
        caused(RecipeError("cannot write the run folder"), os_error(errno.ESTALE)),
        CheckpointError("3 saves in a row have failed, the last one: rank 3: /run/x: [Errno 5] Input/output error"),
        OSError(WORKER.format(errno.EIO)),
        RuntimeError("DataLoader worker (pid 4711) is killed by signal: Killed. "),
        RuntimeError("DataLoader worker (pid(s) 4711) exited unexpectedly"),
        torch.AcceleratorError(ECC),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx(…)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
        dist.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:3699, remote process exited or network error"),
        RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer"),
        ImportError("libtorch_cuda.so: cannot read file data: Input/output error"),
    ],
    ids=str,
)
def test_what_may_pass_is_tried_again(error: Exception) -> None:
    assert may_pass(error)
    assert may_pass(pickle.loads(pickle.dumps(judged(error))))  # as from a worker or another rank


@pytest.mark.parametrize(
    "error",
    [
        *(os_error(number) for number in (errno.ENOENT, errno.EACCES, errno.ENOSPC, errno.EDQUOT, errno.EROFS)),
        ShardError("/data/train-000001.tar ends before its index does"),
        caused(ShardError("cannot read /data/train-000001.tar"), os_error(errno.ENOENT)),
        caused(ShardError("cannot fetch"), urllib.error.HTTPError("http://x", 404, "Not Found", None, None)),  # type: ignore[arg-type]
        RecipeError("unknown key 'train.epoch'"),
        CheckpointError("rank 0: /run/x: [Errno 5] Input/output error; rank 1: [Errno 28] No space left on device"),
        OSError(WORKER.format(errno.ENOENT)),
        UnidentifiedImageError("cannot identify image file"),
        NotFinite("the loss is nan"),
        torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device"),
        dist.DistBackendError("NCCL error: invalid usage\nDuplicate GPU detected : rank 1 and rank 0 both on 1b000"),
        RuntimeError("The size of tensor a (4) must match the size of tensor b (3) at non-singleton dimension 1"),
        ValueError("Input/output error"),
        ImportError("No module named 'deepspeed'"),
    ],
    ids=str,
)
def test_what_a_person_must_mend_is_not(error: Exception) -> None:
    assert not may_pass(error)
