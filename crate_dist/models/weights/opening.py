"""Opens files that torch.save wrote, and runs nothing in them.

A pickle is a program. torch's reader with weights_only=True knows tensors and plain values, and refuses every other
name; of these one more is known here, argparse.Namespace, which training codes save with the options of their command.
It is not built: an inert `Options` takes its place, which gives what it is handed to nothing and no one.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from crate_dist.models.weights.names import WeightsError


class Options:
    """Stands for an argparse.Namespace of a file; `values`: its attributes by name, plain ones, which are none of ours.

    torch hands the state of an object to its __setstate__; were there none, it would write the file's names and values
    among the object's attributes, and look there for a __setstate__ to call.
    """

    __slots__ = ("values",)

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        plain = state.items() if isinstance(state, dict) else ()
        self.values = {
            name: value
            for name, value in plain
            if isinstance(name, str) and (value is None or isinstance(value, bool | int | float | str))
        }


def open_file(path: Path) -> Any:
    """Returns what torch.save has put into a file, tensors on the CPU, a Namespace as `Options`.

    Raises WeightsError when it cannot be read, is damaged, or holds objects of any other kind.
    """
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\x03\x04"  # older files are bare pickles
            if is_zip:
                _check_records(zipfile.ZipFile(file), path)
        with torch.serialization.safe_globals([(Options, "argparse.Namespace")]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except WeightsError:
        raise
    except OSError as error:
        raise WeightsError(f"cannot read {path}: {error.strerror or error}") from error
    except zipfile.BadZipFile as error:
        raise WeightsError(f"{path} is truncated or damaged") from error
    except Exception as error:  # what a pickle of anything else raises is anyone's guess
        if "nsupported global" in str(error) or "nsupported class" in str(error):
            raise WeightsError(
                f"{path} holds Python objects beside its tensors, which are not opened because they could run code; "
                "save its state_dict alone"
            ) from error
        raise WeightsError(f"{path} is no PyTorch checkpoint, or a damaged one; get it anew") from error


def _check_records(archive: zipfile.ZipFile, path: Path) -> None:
    """Raises WeightsError for records that are not as long as they say, or damaged: torch.load looks at no checksum."""
    for record in archive.infolist():  # before testzip, which inflates them
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
            raise WeightsError(
                f"{path}: {record.filename} in it is compressed, or of another size than it says; torch.save writes "
                "none such; save it anew"
            )
    if damaged := archive.testzip():
        raise WeightsError(f"{path} is damaged: the checksum of {damaged} in it is wrong")


def options_of(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the options of the command that wrote a checkpoint, where they are in it as `args`."""
    found = content.get("args")
    return getattr(found, "values", {}) if isinstance(found, Options) else {}
