"""Small tensors of a model in one string of bytes: a name in a file's header costs a hundred bytes, here it costs four."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hpr.coding.codes import Codes, Product, joined, parts_of
from hpr.coding.stream import decode, encode
from hpr.errors import CheckpointError

_VERSION = 4
_HEAD = struct.Struct("<BIII")  # version, bytes of the index, bytes of the stream, checksum of index and plain tensors


@dataclass(frozen=True)
class Pack:
    """Tensors by their keys: ``weights`` of sites, ``others`` that are coded, and ``plain`` ones.

    Plain tensors of int32, such as orders, are coded as well; others are stored as they are.
    """

    weights: Mapping[str, Codes | Product] = field(default_factory=dict)
    others: Mapping[str, Codes] = field(default_factory=dict)
    plain: Mapping[str, Tensor] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """All of them; coded tensors share one stream."""
        parts = {name: parts_of(codes) for name, codes in self.weights.items()}
        whole = {name: tensor for name, tensor in self.plain.items() if tensor.dtype == torch.int32 and tensor.numel()}
        rest = {name: tensor for name, tensor in self.plain.items() if name not in whole}
        coded = [part for some in parts.values() for part in some] + list(self.others.values())
        coded += [_codes(tensor) for tensor in whole.values()]
        stream = encode(coded) if coded else b""
        listed = [[name, str(tensor.dtype).removeprefix("torch."), tensor.shape] for name, tensor in rest.items()]
        counts = {name: len(some) for name, some in parts.items()}
        shapes = {name: tensor.shape for name, tensor in whole.items()}
        names = json.dumps([counts, list(self.others), shapes, listed], separators=(",", ":"))
        index = zlib.compress(names.encode(), 9)
        plain = b"".join(_bytes(tensor) for tensor in rest.values())
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
        weights, others, whole, listed = json.loads(zlib.decompress(index))
        codes = iter(decode(stream) if weights or others or whole else ())
        found = {name: joined([next(codes) for _ in range(count)]) for name, count in weights.items()}
        rest = {name: next(codes) for name in others}
        tensors = {name: torch.from_numpy(next(codes).values.copy()).reshape(shape) for name, shape in whole.items()}
        place = 0
        for name, dtype, shape in listed:
            tensors[name] = torch.empty(shape, dtype=getattr(torch, dtype))
            size = tensors[name].nbytes
            if size:
                tensors[name].copy_(
                    torch.frombuffer(bytearray(plain[place : place + size]), dtype=tensors[name].dtype).reshape(shape)
                )
            place += size
        return cls(found, rest, tensors)


def _codes(whole: Tensor) -> Codes:
    """A tensor of int32 as the codes of one row."""
    values = whole.cpu().numpy().reshape(1, -1)
    return Codes(values, np.zeros(1, np.int32), np.zeros(values.size, np.int32), 1.0)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()


_AGAIN = "copy or download the checkpoint again"
