"""A gzip stream that is smaller than what gzip makes of integers.

The usual search for repeated strings makes small integers larger: what repeats in them does so by chance. So each piece of the
data is deflated in several ways and the shortest one is taken. Any inflater reads the result, a browser's too
(``Content-Encoding: gzip``).
"""

from __future__ import annotations

import struct
import zlib

_PIECE = 1 << 17  # bytes that are deflated in one way; a piece reads nothing of those before it
_WAYS = ((zlib.Z_DEFAULT_STRATEGY, 9), (zlib.Z_FILTERED, 9), (zlib.Z_HUFFMAN_ONLY, 9), (zlib.Z_HUFFMAN_ONLY, 7))
_HEADER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x02\xff"  # gzip without a name or a time, so that equal data give equal bytes
_EMPTY = b"\x03\x00"  # a last block without data


def deflated(data: bytes) -> bytes:
    """The data as one gzip stream; ``gzip.decompress`` gives them back.

    >>> import gzip
    >>> gzip.decompress(deflated(b"abc" * 100)) == b"abc" * 100
    True
    """
    pieces = (_shortest(data[start : start + _PIECE]) for start in range(0, len(data), _PIECE))
    return b"".join((_HEADER, *pieces, _EMPTY, struct.pack("<II", zlib.crc32(data), len(data) & 0xFFFFFFFF)))


def _shortest(piece: bytes) -> bytes:
    return min((_in_one_way(piece, strategy, memory) for strategy, memory in _WAYS), key=len)


def _in_one_way(piece: bytes, strategy: int, memory: int) -> bytes:
    """Blocks of deflate that end at a byte, none of them marked as the last. ``memory``: of how many symbols a block has."""
    deflater = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS, memory, strategy)
    return deflater.compress(piece) + deflater.flush(zlib.Z_SYNC_FLUSH)
