"""Reads from the first directory of a TIFF how much work its decoding is, before a library follows that directory.

libtiff decodes whole tiles, however little of one lies in the picture; several may name the same few bytes. Pillow
makes an object of every tile that an uncompressed file names, before it looks at its size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT, _ROWS_PER_STRIP = 256, 257, 322, 323, 278
_OFFSETS, _BYTE_COUNTS = (273, 324), (279, 325)  # of strips, of tiles
_INTEGERS = {1: "u1", 3: "u2", 4: "u4", 6: "i1", 8: "i2", 9: "i4", 13: "u4", 16: "u8", 17: "i8", 18: "u8"}
_MAX_TAGS = 2**16
_MAX_VALUES = 2**21  # of one tag: six planes of as many tiles as are taken


@dataclass(frozen=True)
class Pieces:
    """The tiles or strips of the first picture.

    number: that cover it; width, height: of each in pixels; named: how many the file has offsets of, over all planes;
    data_bytes: what stands there, the same bytes counted as often as they are named
    """

    number: int
    width: int
    height: int
    named: int
    data_bytes: int


def tiff_pieces(data: bytes) -> Pieces | None:
    """Reads the directory of a TIFF; None for other bytes, or for a picture of no size."""
    if data[:2] not in (b"II", b"MM") or not {42, 43} & set(data[2:4]):
        return None
    tags = _Directory(data)
    width, height = tags.value(_WIDTH), tags.value(_HEIGHT)
    if width < 1 or height < 1:
        return None
    across, down = tags.value(_TILE_WIDTH), tags.value(_TILE_HEIGHT)
    if across > 0 or down > 0:
        across, down = across if across > 0 else width, down if down > 0 else height
    else:
        rows = tags.value(_ROWS_PER_STRIP)
        across, down = width, min(rows, height) if rows > 0 else height
    named = max(tags.count(tag) for tag in _OFFSETS)
    data_bytes = max(int(tags.values(tag).clip(0, len(data)).sum()) for tag in _BYTE_COUNTS)
    return Pieces(-(-width // across) * -(-height // down), across, down, named, data_bytes)


class _Directory:
    """The entries of a directory; of those with the same tag the first counts, as for libtiff and Pillow."""

    def __init__(self, data: bytes) -> None:
        self._data, self._order = data, "<" if data[:1] == b"I" else ">"
        word, number, where = ("u8", "u8", 8) if 43 in data[2:4] else ("u4", "u2", 4)
        fields = np.dtype([("tag", "u2"), ("type", "u2"), ("count", word), ("value", word)])
        start = int(self._array(word, where, 1).sum())
        tags = min(int(self._array(number, start, 1).sum()), _MAX_TAGS)
        self._room = np.dtype(word).itemsize
        self._first, self._size = start + np.dtype(number).itemsize, fields.itemsize
        self._entries = self._array(fields, self._first, tags)

    def count(self, tag: int) -> int:
        """Returns the most values that any entry with this tag is to have."""
        return int(self._entries["count"][self._entries["tag"] == tag].max(initial=0))

    def value(self, tag: int) -> int:
        """Returns the first value of a tag, 0 for none."""
        return next(iter(self.values(tag).tolist()), 0)

    def values(self, tag: int) -> np.ndarray:
        """Returns a tag's values, if whole numbers, as far as they lie in the file and are needed: int64, 1-d."""
        for place in np.flatnonzero(self._entries["tag"] == tag)[:1].tolist():
            entry = self._entries[place]
            if kind := _INTEGERS.get(int(entry["type"])):
                count = int(entry["count"])
                here = count * np.dtype(kind).itemsize <= self._room
                start = self._first + (place + 1) * self._size - self._room if here else int(entry["value"])
                values = self._array(kind, start, min(count, _MAX_VALUES))
                return values.clip(max=np.iinfo(np.int64).max).astype(np.int64) if kind == "u8" else values.astype(int)
        return np.zeros(0, np.int64)

    def _array(self, kind: str | np.dtype, start: int, count: int) -> np.ndarray:
        """Reads `count` numbers, or as many as lie in the file whole."""
        dtype = np.dtype(kind).newbyteorder(self._order)  # type: ignore[arg-type]
        piece = self._data[start : start + count * dtype.itemsize]
        return np.frombuffer(piece[: len(piece) // dtype.itemsize * dtype.itemsize], dtype)
