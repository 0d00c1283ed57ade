"""Small tensors of a model in one string of bytes: a name in a file's header costs a hundred bytes, here it costs four."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hpr.coding.codes import Codes, Product, joined, parts_of
from hpr.coding.stream import decode, encode
from hpr.errors import CheckpointError

_VERSION = 3
_HEAD = struct.Struct("<BIII")  # version, bytes of the index, bytes of the stream, checksum of index and plain tensors


@dataclass(frozen=True)
class Pack:
    """Tensors by their keys: ``weights`` of sites, ``others`` that are coded, and ``plain`` ones."""

    weights: Mapping[str, Codes | Product] = field(default_factory=dict)
    others: Mapping[str, Codes] = field(default_factory=dict)
    plain: Mapping[str, Tensor] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """All of them; coded tensors share one stream."""
        parts = {name: parts_of(codes) for name, codes in self.weights.items()}
        coded = [part for some in parts.values() for part in some] + list(self.others.values())
        stream = encode(coded) if coded else b""
        listed = [[name, str(tensor.dtype).removeprefix("torch."), tensor.shape] for name, tensor in self.plain.items()]
        counts = {name: len(some) for name, some in parts.items()}
        names = json.dumps([counts, list(self.others), listed], separators=(",", ":"))
        index = zlib.compress(names.encode(), 9)
        plain = b"".join(_bytes(tensor) for tensor in self.plain.values())
        return _HEAD.pack(_VERSION, len(index), len(stream), zlib.crc32(index + plain)) + index + stream + plain

    @classmethod
    def from_bytes(cls, packed: bytes) -> Pack:
        """What ``to_bytes`` wrote. Raises ``CheckpointError`` for damaged bytes and for those of another version."""
        try:
            version, indexed, coded, checksum = _HEAD.unpack_from(packed)
        except struct.error as error:
            raise CheckpointError(f"packed tensors of {len(packed)} bytes are fewer than their head: {_AGAIN}") from error
        if version != _VERSION:
            raise CheckpointError(f"packed tensors have format {version}, this hpr reads {_VERSION}: save the model again")
        start = _HEAD.size + indexed
        index, stream, plain = packed[_HEAD.size : start], packed[start : start + coded], packed[start + coded :]
        if zlib.crc32(index + plain) != checksum:
            raise CheckpointError(f"packed tensors are damaged (their checksum differs): {_AGAIN}")
        weights, others, listed = json.loads(zlib.decompress(index))
        codes = iter(decode(stream) if weights or others else ())
        tensors, place = {}, 0
        for name, dtype, shape in listed:
            tensors[name] = torch.empty(shape, dtype=getattr(torch, dtype))
            size = tensors[name].nbytes
            if size:
                tensors[name].copy_(
                    torch.frombuffer(bytearray(plain[place : place + size]), dtype=tensors[name].dtype).reshape(shape)
                )
            place += size
        found = {name: joined([next(codes) for _ in range(count)]) for name, count in weights.items()}
        return cls(found, {name: next(codes) for name in others}, tensors)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()


_AGAIN = "copy or download the checkpoint again"
