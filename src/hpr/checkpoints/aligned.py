"""Lay out a safetensors file so that tensors begin at addresses where torch would allocate them.

A loaded model keeps its weights in the file that is mapped to memory: processes share them, and pages that are not read take
none. Kernels and their rounding differ by alignment, so weights at odd addresses have to be copied to compute bit for bit what
they did when they were saved. The format allows spaces after the header and any order of tensors, but no gaps between them.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

ALIGNMENT = 64  # bytes, as torch allocates on a processor
_LENGTH = struct.Struct("<Q")  # of the header, before it
_METADATA = "__metadata__"
_CHUNK = 1 << 24


def align_file(path: Path) -> None:
    """Write a safetensors file anew, with as many bytes of tensors at aligned places as can be. Its content stays the same."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.aligned")
    try:
        with path.open("rb") as source, partial.open("wb") as target:
            (length,) = _LENGTH.unpack(source.read(_LENGTH.size))
            header: dict[str, Any] = json.loads(source.read(length))
            tensors = {name: header[name] for name in _order(header)}
            described, place = {name: value for name, value in header.items() if name == _METADATA}, 0
            for name, entry in tensors.items():
                size = _size(entry)
                described[name] = {**entry, "data_offsets": [place, place + size]}
                place += size
            text = json.dumps(described, separators=(",", ":")).encode()
            text += b" " * (-(_LENGTH.size + len(text)) % ALIGNMENT)
            target.write(_LENGTH.pack(len(text)) + text)
            for entry in tensors.values():
                source.seek(_LENGTH.size + length + entry["data_offsets"][0])
                _copy(source, target, _size(entry))
        partial.chmod(path.stat().st_mode)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _order(header: Mapping[str, Any]) -> list[str]:
    """The names of the tensors: first those that keep what follows aligned, then others, with small ones to fill gaps.

    Each dtype's tensors begin at multiples of its own size, as torch demands.
    """
    sizes = {name: _size(entry) for name, entry in header.items() if name != _METADATA}
    order = [name for name, size in sizes.items() if size % ALIGNMENT == 0]
    others = [name for name, size in sizes.items() if size % ALIGNMENT]
    place = 0
    for width in sorted({_width(header[name], sizes[name]) for name in others}, reverse=True):
        group = sorted((name for name in others if _width(header[name], sizes[name]) == width), key=lambda name: -sizes[name])
        small = [name for name in group if sizes[name] < ALIGNMENT]
        for name in (name for name in group if sizes[name] >= ALIGNMENT):
            fillers = _fillers(-place % ALIGNMENT, small, sizes)
            small = [one for one in small if one not in fillers]
            order += [*fillers, name]
            place += sum(sizes[one] for one in fillers) + sizes[name]
        order += small
        place += sum(sizes[one] for one in small)
    return order


def _fillers(gap: int, small: list[str], sizes: Mapping[str, int]) -> list[str]:
    """Small tensors, given from large to small, that fill a gap exactly; none if they do not."""
    chosen = []
    for name in small:
        if sizes[name] <= gap:
            chosen.append(name)
            gap -= sizes[name]
    return chosen if gap == 0 else []


def _width(entry: Mapping[str, Any], size: int) -> int:
    """The bytes of a number of a tensor."""
    count = 1
    for side in entry["shape"]:
        count *= side
    return size // count


def _size(entry: Mapping[str, Any]) -> int:
    start, stop = entry["data_offsets"]
    return int(stop - start)


def _copy(source: BinaryIO, target: BinaryIO, size: int) -> None:
    while size:
        part = source.read(min(size, _CHUNK))
        target.write(part)
        size -= len(part)
