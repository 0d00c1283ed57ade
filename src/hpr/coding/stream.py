"""Codes of one or more weights as a stream of bytes: asymmetric numeral systems (Duda, 2013), by the package ``constriction``.

A stream stands alone, and a checksum tells if a byte has changed. Weights in one stream share their probability tables, so
small weights belong together. In the order of decoding a stream holds the exponents of the scales, the exponents of the
expected sizes of the codes by row and by column, and the codes.

The distribution of a code depends on its expected size, which the decoder knows: the product of its row's and its column's
size. Codes of about the same expected size form a bucket with one probability table. If the expected size is large, the
lowest bits of a code are equally likely and are stored as they are.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from hpr.coding.codes import Codes
from hpr.coding.layout import LARGEST, SMALLEST, Layout, describe, described, exponents, filled
from hpr.coding.tables import Table, ans, uniform
from hpr.errors import CheckpointError

VERSION = 2
_HEAD = struct.Struct("<BBIII")  # version, whether sizes are sent, words, bytes of the description, checksum
_PLAIN_ABOVE = 8  # from this bucket on, a code's lowest bits are stored as they are
_AGAIN = "copy or download the checkpoint again"


def encode(weights: Sequence[Codes]) -> bytes:
    """The codes of at least one weight as the shorter of two streams: with expected sizes sent, or taken from the scales."""
    return _encoded(weights, _choice(weights))


def decode(stream: bytes) -> list[Codes]:
    """The codes that ``encode`` wrote. Raises ``CheckpointError`` for a damaged stream and for one of another version."""
    try:
        version, sized, words, length, checksum = _HEAD.unpack_from(stream)
    except struct.error as error:
        raise CheckpointError(f"a stream of coded weights has {len(stream)} bytes, fewer than its head: {_AGAIN}") from error
    if version != VERSION:
        raise CheckpointError(
            f"a stream of coded weights has format {version}, this hpr reads {VERSION}: save the model again with this hpr, or "
            f"read it with the version that wrote it"
        )
    if len(stream) != _HEAD.size + length + 4 * words or zlib.crc32(_checked(stream)) != checksum:
        raise CheckpointError(f"a stream of coded weights is damaged (its checksum differs): {_AGAIN}")
    layouts, packed = described(zlib.decompress(stream[_HEAD.size : _HEAD.size + length]))
    tables = _unpack(packed)
    coder = ans()(np.frombuffer(stream, dtype="<u4", offset=_HEAD.size + length, count=words).astype(np.uint32))
    layouts = filled(layouts, bool(sized), lambda count: next(tables).decode(coder, count))
    values = np.empty(sum(layout.numbers for layout in layouts), dtype=np.int32)
    for bucket, places in _buckets(layouts, bool(sized)):
        bits = _plain_bits(bucket)
        values[places] = next(tables).decode(coder, len(places)) << bits
        if bits:
            values[places] += coder.decode(uniform(bits), len(places))
    parts = np.split(values, np.cumsum([layout.numbers for layout in layouts])[:-1])
    return [layout.codes(part) for layout, part in zip(layouts, parts, strict=True)]


@dataclass(frozen=True, eq=False)
class _Choice:
    """How codes are laid out: ``values`` is flat, ``buckets`` in order of decoding, ``bytes`` an estimate."""

    layouts: Sequence[Layout]
    sized: bool
    values: Int[np.ndarray, " codes"]
    buckets: Sequence[tuple[int, np.ndarray]]
    bytes: int


def _choice(weights: Sequence[Codes]) -> _Choice:
    layouts = [Layout.of(codes) for codes in weights]
    values = np.concatenate([(codes.values - layout.centre).ravel() for codes, layout in zip(weights, layouts, strict=True)])
    choices = []
    for sized in (True, False) if any(not layout.flat for layout in layouts) else (False,):
        buckets = list(_buckets(layouts, sized))
        bits = sum(_entropy(symbols) for symbols in exponents(layouts, sized))
        for bucket, places in buckets:
            plain = _plain_bits(bucket)
            bits += _entropy(values[places] >> plain) + plain * len(places)
        choices.append(
            _Choice(layouts, sized, values, buckets, int(bits / 8) + _HEAD.size + 30 * len(buckets) + 12 * len(layouts))
        )
    return min(choices, key=lambda choice: choice.bytes)


def _encoded(weights: Sequence[Codes], choice: _Choice) -> bytes:
    tables: list[Table] = []
    steps: list[Callable[[object], None]] = []

    def put(symbols: np.ndarray) -> None:
        table = Table.of(symbols)
        tables.append(table)
        steps.append(lambda coder: table.encode(coder, symbols))

    for symbols in exponents(choice.layouts, choice.sized):
        put(symbols)
    for bucket, places in choice.buckets:
        bits, symbols = _plain_bits(bucket), choice.values[places]
        put(symbols >> bits)
        if bits:
            low = (symbols & ((1 << bits) - 1)).astype(np.int32)
            steps.append(lambda coder, low=low, bits=bits: coder.encode_reverse(low, uniform(bits)))  # type: ignore[misc]
    coder = ans()()
    for step in reversed(steps):
        step(coder)
    words = coder.get_compressed().astype("<u4").tobytes()
    description = zlib.compress(describe(choice.layouts) + _pack(tables), 9)
    head = (VERSION, choice.sized, len(words) // 4, len(description))
    unsealed = _HEAD.pack(*head, 0) + description + words
    return _HEAD.pack(*head, zlib.crc32(_checked(unsealed))) + description + words


def _buckets(layouts: Sequence[Layout], sized: bool) -> Iterator[tuple[int, np.ndarray]]:
    """The number of each bucket that is not empty, and the places of its codes among all."""
    parts = [np.clip(layout.expected(sized), SMALLEST, LARGEST).astype(np.int8) for layout in layouts]
    buckets = np.concatenate(parts)
    order = np.argsort(buckets, kind="stable")
    starts = np.flatnonzero(np.diff(buckets[order])) + 1
    for places in np.split(order, starts):
        yield int(buckets[places[0]]), places


def _checked(stream: bytes) -> bytes:
    """All but the checksum."""
    return stream[: _HEAD.size - 4] + stream[_HEAD.size :]


def _plain_bits(bucket: int) -> int:
    return max(0, bucket - _PLAIN_ABOVE + 2) // 2


def _entropy(symbols: np.ndarray) -> float:
    """The bits of symbols whose frequencies are known."""
    counts = np.bincount(symbols - symbols.min())
    counts = counts[counts > 0]
    return float(counts @ np.log2(len(symbols) / counts))


def _pack(tables: list[Table]) -> bytes:
    return b"".join(struct.pack("<iI", table.first, len(table.bytes)) + table.bytes.tobytes() for table in tables)


def _unpack(packed: bytes) -> Iterator[Table]:
    place = 0
    while place < len(packed):
        first, count = struct.unpack_from("<iI", packed, place)
        place += 8 + count
        yield Table(first, np.frombuffer(packed, np.uint8, count, place - count))
