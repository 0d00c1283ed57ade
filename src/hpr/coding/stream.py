"""One weight's codes as a stream of bytes: asymmetric numeral systems (Duda, 2013), by the package ``constriction``.

A stream stands alone: any weight can be decoded without the others, and a checksum tells if a byte has changed. In the order
of decoding it holds the exponents of the scales, the exponents of the expected sizes of the codes by row and by column, and
the codes.

The distribution of a code depends on its expected size, which the decoder knows: the product of its row's and its column's
size. Codes of about the same expected size form a bucket with one probability table. If the expected size is large, the
lowest bits of a code are equally likely and are stored as they are.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from hpr.coding.codes import Codes
from hpr.coding.tables import Table, ans, uniform
from hpr.errors import CheckpointError

VERSION = 1
_HEAD = struct.Struct("<BBHIIdIII")  # version, mode, width, out, in, scale, words, bytes of tables, checksum
_SMALLEST, _LARGEST = -12, 40  # buckets: half octaves of the expected size over the step
_PLAIN_ABOVE = 8  # from this bucket on, a code's lowest bits are stored as they are
_MODES = ("sizes", "scales", "alike")  # where the expected size comes from
_WIDTHS = (1, 2, 4)  # half octaves in one bucket


@dataclass(frozen=True, eq=False)
class _Layout:
    """What the decoder knows before the codes: the exponents, and in which bucket every code is."""

    mode: str
    width: int
    rows: Int[np.ndarray, " out"]
    columns: Int[np.ndarray, " in"]
    row_sizes: Int[np.ndarray, " out"]
    column_sizes: Int[np.ndarray, " in"]

    def vectors(self) -> tuple[np.ndarray, ...]:
        """The exponents that the stream holds, in order."""
        sizes = (self.row_sizes, self.column_sizes) if self.mode == "sizes" else (self.row_sizes[:1],)
        return (self.rows, self.columns, *sizes)

    def buckets(self) -> Iterator[tuple[int, np.ndarray]]:
        """The number of each bucket that is not empty, and the places of its codes in the flat weight."""
        if self.mode == "sizes":
            sizes = self.row_sizes[:, None] + self.column_sizes
        elif self.mode == "scales":
            sizes = self.row_sizes[0] - self.rows[:, None] - self.columns
        else:
            sizes = np.full((len(self.rows), len(self.columns)), self.row_sizes[0])
        buckets = (np.clip(sizes, _SMALLEST, _LARGEST) // self.width).astype(np.int8).ravel()
        order = np.argsort(buckets, kind="stable")
        ordered = buckets[order]
        starts = np.flatnonzero(np.diff(ordered)) + 1
        for places in np.split(order, starts):
            yield int(buckets[places[0]]), places


def encode(codes: Codes) -> bytes:
    """The shortest stream of a weight's codes, of a few layouts that are tried."""
    sizes = _sizes(codes.values)
    mean = _exponent(np.sqrt(np.mean(np.square(codes.values, dtype=np.float64), keepdims=True))[0])
    centre = mean + np.rint(np.mean(codes.rows) + np.mean(codes.columns)).astype(np.int32)
    known = {"sizes": sizes, "scales": (centre, sizes[1]), "alike": (mean, sizes[1])}
    large = codes.values.size > 1 << 18  # tables of a few more buckets cost nothing there
    layouts = [
        _Layout(mode, width, codes.rows, codes.columns, *known[mode])
        for mode in (_MODES[:2] if large else _MODES)
        for width in (_WIDTHS[:1] if large else _WIDTHS)
        if mode != "alike" or width == 1
    ]
    return min((_encoded(codes, layout) for layout in layouts), key=len)


def decode(stream: bytes) -> Codes:
    """The codes that ``encode`` wrote. Raises ``CheckpointError`` for a damaged stream and for one of a later version."""
    try:
        version, mode, width, height, length, scale, words, tabled, checksum = _HEAD.unpack_from(stream)
    except struct.error as error:
        raise CheckpointError(f"a coded weight has {len(stream)} bytes, fewer than its head: {_AGAIN}") from error
    if version != VERSION:
        raise CheckpointError(f"a coded weight has format {version}, this hpr reads {VERSION}: update hpr, or {_AGAIN}")
    if len(stream) != _HEAD.size + tabled + 4 * words or zlib.crc32(_checked(stream)) != checksum:
        raise CheckpointError(f"a coded weight of {height} × {length} numbers is damaged (its checksum differs): {_AGAIN}")
    tables = _unpack(zlib.decompress(stream[_HEAD.size : _HEAD.size + tabled]))
    coder = ans()(np.frombuffer(stream, dtype="<u4", offset=_HEAD.size + tabled, count=words).astype(np.uint32))
    lengths = [height, length, *((height, length) if _MODES[mode] == "sizes" else (1,))]
    vectors = [next(tables).decode(coder, count) for count in lengths]
    rows, columns, row_sizes = vectors[:3]
    layout = _Layout(_MODES[mode], width, rows, columns, row_sizes, vectors[-1])
    values = np.empty(height * length, dtype=np.int32)
    for number, places in layout.buckets():
        bits = _plain_bits(number, width)
        values[places] = next(tables).decode(coder, len(places)) << bits
        if bits:
            values[places] += coder.decode(uniform(bits), len(places))
    return Codes(values.reshape(height, length), rows, columns, scale)


_AGAIN = "copy or download the checkpoint again"


def _encoded(codes: Codes, layout: _Layout) -> bytes:
    values = codes.values.ravel()
    tables: list[Table] = []
    steps: list[Callable[[object], None]] = []

    def put(symbols: np.ndarray) -> None:
        table = Table.of(symbols)
        tables.append(table)
        steps.append(lambda coder: table.encode(coder, symbols))

    for vector in layout.vectors():
        put(vector)
    for number, places in layout.buckets():
        bits, symbols = _plain_bits(number, layout.width), values[places]
        put(symbols >> bits)
        if bits:
            low = (symbols & ((1 << bits) - 1)).astype(np.int32)
            steps.append(lambda coder, low=low, bits=bits: coder.encode_reverse(low, uniform(bits)))  # type: ignore[misc]
    coder = ans()()
    for step in reversed(steps):
        step(coder)
    words = coder.get_compressed().astype("<u4").tobytes()
    packed = zlib.compress(_pack(tables), 9)
    mode = _MODES.index(layout.mode)
    head = (VERSION, mode, layout.width, *codes.values.shape, codes.scale, len(words) // 4, len(packed))
    unsealed = _HEAD.pack(*head, 0) + packed + words
    return _HEAD.pack(*head, zlib.crc32(_checked(unsealed))) + packed + words


def _checked(stream: bytes) -> bytes:
    """All but the checksum."""
    return stream[: _HEAD.size - 4] + stream[_HEAD.size :]


def _plain_bits(bucket: int, width: int) -> int:
    return max(0, bucket * width - _PLAIN_ABOVE + 2) // 2


def _sizes(values: Int[np.ndarray, "out in"]) -> tuple[np.ndarray, np.ndarray]:
    """Half octaves of the root mean square of each row, and of each column relative to all."""
    squares = np.square(values, dtype=np.float64)
    whole = max(float(squares.mean()), 1e-12)
    return _exponent(np.sqrt(squares.mean(1))), _exponent(np.sqrt(squares.mean(0) / whole))


def _exponent(sizes: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(2 * np.log2(np.maximum(sizes, 1e-9))), 2 * _SMALLEST, _LARGEST).astype(np.int32)


def _pack(tables: list[Table]) -> bytes:
    return b"".join(struct.pack("<iI", table.first, len(table.bytes)) + table.bytes.tobytes() for table in tables)


def _unpack(packed: bytes) -> Iterator[Table]:
    place = 0
    while place < len(packed):
        first, count = struct.unpack_from("<iI", packed, place)
        place += 8 + count
        yield Table(first, np.frombuffer(packed, np.uint8, count, place - count))
