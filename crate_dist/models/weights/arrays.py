"""Opens files of NumPy arrays (.npz), which training codes in JAX write, and runs nothing in them.

Such a file is a zip of .npy files, each a header (dtype, order, shape) before the values. NumPy would unpickle an array
of objects, and believe a header that names more than there is; zipfile would inflate all that there is before it cuts
at the size that the directory names. Here no more is inflated than that size, which one file may not make larger than
weights are, headers are checked before their values are taken, and nothing is unpickled.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from crate_dist.models.weights.names import WeightsError

_END = ".npy"
_INFLATION = 16
"""Times its own size that a file's arrays may have; weights hardly compress, and a bomb does a thousand times."""
_SMALL = 2**24
"""Bytes of arrays that any file may have."""
_KINDS = "fiub"
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


def is_archive(path: Path) -> bool:
    """Returns whether a file is a zip with .npy files in it, so far as zipfile can tell."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # of a directory that is none, zipfile says so in many ways; open_file has words for it
        return False
    return any(name.endswith(_END) for name in names)


def open_arrays(path: Path, tree: str) -> Mapping[str, Tensor]:
    """Returns the arrays of a .npz by name: those below `tree`, without it, where there are such, else all.

    What else the zip holds is left alone. bfloat16, which NumPy writes as two bytes of no type, is bfloat16 again.
    Raises WeightsError when it cannot be read, is damaged, has Python objects in it, claims more than it
    holds, or holds two arrays of one name.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            archived = [member for member in archive.infolist() if member.filename.endswith(_END)]
            members = {member.filename.removesuffix(_END): member for member in archived}
            if len(members) < len(archived):
                raise WeightsError(f"{path} has two arrays of one name; save it anew")
            below = {name.removeprefix(tree): each for name, each in members.items() if name.startswith(tree)}
            wanted = below or members
            claimed, most = sum(each.file_size for each in wanted.values()), path.stat().st_size * _INFLATION
            if claimed > max(most, _SMALL):
                raise WeightsError(f"{path} claims {claimed:,} bytes of arrays, which a file of its size does not hold")
            tensors = {}
            for name, member in wanted.items():
                if member.compress_type not in _METHODS:  # of the others, zipfile inflates without an end
                    raise WeightsError(f"{path}: {name} is compressed as NumPy compresses nothing; save it anew")
                with archive.open(member) as file:  # at whose end zipfile compares the checksum
                    tensors[name] = _read_array(file.read(member.file_size), f"{path}: {name}")
            return tensors
    except WeightsError:
        raise
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # zipfile, zlib and NumPy have each their own
        raise WeightsError(f"{path} is truncated or damaged: {error}") from error


def _read_array(content: bytes, what: str) -> Tensor:
    """Reads a .npy file."""
    file, size = io.BytesIO(content), len(content)
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, by_columns, dtype = header(file)
    if dtype.hasobject:
        raise WeightsError(f"{what} holds Python objects, which are not opened because they could run code")
    is_bfloat16 = dtype == np.dtype("V2")
    if not is_bfloat16 and (dtype.kind not in _KINDS or dtype.itemsize > 8):
        raise WeightsError(f"{what} holds values of type {dtype}, which are no weights")
    if (length := math.prod(shape) * dtype.itemsize) != size - file.tell() or min(shape, default=0) < 0:
        raise WeightsError(
            f"{what} is damaged: shape {shape} asks for {length:,} bytes, and {size - file.tell():,} follow"
        )
    values = np.frombuffer(bytearray(memoryview(content)[file.tell() :]), np.dtype("<i2") if is_bfloat16 else dtype)
    values = values.reshape(shape, order="F" if by_columns else "C")
    tensor = torch.from_numpy(np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("=")).reshape(shape))
    return tensor.view(torch.bfloat16) if is_bfloat16 else tensor
