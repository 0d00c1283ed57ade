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
_TABLE = 240  # bits of one probability table, about
_FAR = 1 << 12  # codes are counted as one from this size on, which bounds the memory
_PLAIN_ABOVE = 8  # from this bucket on, a code's lowest bits are stored as they are
_AGAIN = "copy or download the checkpoint again"


def encode(weights: Sequence[Codes]) -> bytes:
    """The codes of at least one weight as the shorter of two streams: with expected sizes sent, or taken from the scales."""
    return _encoded(weights, choice_of(weights))


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
        bits = plain_bits(bucket)
        values[places] = next(tables).decode(coder, len(places)) << bits
        if bits:
            values[places] += coder.decode(uniform(bits), len(places))
    parts = np.split(values, np.cumsum([layout.numbers for layout in layouts])[:-1])
    return [layout.codes(part) for layout, part in zip(layouts, parts, strict=True)]


def estimate(codes: Codes, every: int = 1) -> float:
    """About the bytes of one weight's codes in a stream, in a fraction of the time: their entropy, without tables.

    One of ``every`` so many rows stands for the others.
    """
    height = len(codes.rows)
    kept = Codes(codes.values[::every], codes.rows[::every], codes.columns, codes.scale)
    choice, more = choice_of([kept]), height / len(kept.rows)
    bits = _entropy(bucket_of_each(choice.layouts, choice.sized), choice.values) * more
    for kind, symbols in enumerate(exponents(choice.layouts, choice.sized)):
        bits += _plain_entropy(symbols) * (1 if kind % 2 else more)  # those of rows and of columns alternate
    return bits / 8


@dataclass(frozen=True, eq=False)
class Choice:
    """How codes are laid out. ``values``: flat, less their centres; ``bits``: about how many the stream has."""

    layouts: Sequence[Layout]
    sized: bool
    values: Int[np.ndarray, " codes"]
    bits: float


def choice_of(weights: Sequence[Codes]) -> Choice:
    """The layout of fewest bits, expected sizes being sent or taken from the scales."""
    layouts = [Layout.of(codes) for codes in weights]
    values = np.concatenate([(codes.values - layout.centre).ravel() for codes, layout in zip(weights, layouts, strict=True)])

    def bits(sized: bool) -> float:
        sizes = sum(_plain_entropy(symbols) for symbols in exponents(layouts, sized))
        buckets = bucket_of_each(layouts, sized)
        tables = np.count_nonzero(np.bincount(buckets.astype(np.int64) - SMALLEST))
        return sizes + _entropy(buckets, values) + _TABLE * tables

    ways = {sized: bits(sized) for sized in ((True, False) if any(not layout.flat for layout in layouts) else (False,))}
    sized = min(ways, key=lambda way: ways[way])
    return Choice(layouts, sized, values, ways[sized])


def _encoded(weights: Sequence[Codes], choice: Choice) -> bytes:
    tables: list[Table] = []
    steps: list[Callable[[object], None]] = []

    def put(symbols: np.ndarray) -> None:
        table = Table.of(symbols)
        tables.append(table)
        steps.append(lambda coder: table.encode(coder, symbols))

    for symbols in exponents(choice.layouts, choice.sized):
        put(symbols)
    for bucket, places in _buckets(choice.layouts, choice.sized):
        bits, symbols = plain_bits(bucket), choice.values[places]
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


def bucket_of_each(layouts: Sequence[Layout], sized: bool) -> Int[np.ndarray, " codes"]:
    """The bucket of every code of several weights, int8, one weight after the other."""
    return np.concatenate([np.clip(layout.expected(sized), SMALLEST, LARGEST).astype(np.int8) for layout in layouts])


def _buckets(layouts: Sequence[Layout], sized: bool) -> Iterator[tuple[int, np.ndarray]]:
    """The number of each bucket that is not empty, and the places of its codes among all."""
    buckets = bucket_of_each(layouts, sized)
    order = np.argsort(buckets, kind="stable")
    starts = np.flatnonzero(np.diff(buckets[order])) + 1
    for places in np.split(order, starts):
        yield int(buckets[places[0]]), places


def _checked(stream: bytes) -> bytes:
    """All but the checksum."""
    return stream[: _HEAD.size - 4] + stream[_HEAD.size :]


def plain_bits(bucket: int) -> int:
    """How many of the lowest bits of a code are stored as they are, in a bucket."""
    return max(0, bucket - _PLAIN_ABOVE + 2) // 2


_PLAIN = np.array([plain_bits(bucket) for bucket in (*range(LARGEST + 1), *range(SMALLEST, 0))])  # negative ones from the end


def _entropy(buckets: Int[np.ndarray, " n"], values: Int[np.ndarray, " n"]) -> float:
    """The bits of values if the frequencies in each bucket are known; values far out count as one."""
    plain = _PLAIN[buckets]
    symbols = np.clip(values >> plain, -_FAR, _FAR)
    least = int(symbols.min())
    width = int(symbols.max()) - least + 1
    places = (buckets.astype(np.int64) - SMALLEST) * width + (symbols - least)
    counts = np.bincount(places, minlength=(LARGEST - SMALLEST + 1) * width).reshape(-1, width).astype(np.float64)
    return float(plain.sum(dtype=np.int64)) + float(_information(counts.sum(1)).sum() - _information(counts).sum())


def _plain_entropy(symbols: Int[np.ndarray, " n"]) -> float:
    return _entropy(np.zeros(len(symbols), np.int64), symbols)


def _information(counts: np.ndarray) -> np.ndarray:
    return counts * np.log2(np.maximum(counts, 1))


def _pack(tables: list[Table]) -> bytes:
    return b"".join(struct.pack("<iI", table.first, len(table.bytes)) + table.bytes.tobytes() for table in tables)


def _unpack(packed: bytes) -> Iterator[Table]:
    place = 0
    while place < len(packed):
        first, count = struct.unpack_from("<iI", packed, place)
        place += 8 + count
        yield Table(first, np.frombuffer(packed, np.uint8, count, place - count))
