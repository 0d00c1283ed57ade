"""The bytes of small integers, packed by their entropy in the two ways that are at hand without a model of the weights."""

from __future__ import annotations

import constriction
import numpy as np
import zstandard
from jaxtyping import Int

# Rounded weights repeat nothing, so what zstd gains is its entropy coder. Matches of seven bytes and a small table of
# places keep it from the short matches that cost more than they save: as small as level 19, and a thousand times faster.
_NO_MATCHES = zstandard.ZstdCompressionParameters.from_level(1, min_match=7, hash_log=6, search_log=1)


def ans_bytes(codes: Int[np.ndarray, "out in"]) -> int:
    """The bytes of codes from 0 to 255 by ANS with one table of probabilities for all, the table included in 16 bits each."""
    flat = codes.ravel().astype(np.int32)
    counts = np.bincount(flat, minlength=2).astype(np.float64)
    coder = constriction.stream.stack.AnsCoder()
    coder.encode_reverse(flat, constriction.stream.model.Categorical(counts / counts.sum(), perfect=False))
    return 4 * len(coder.get_compressed()) + 2 * len(counts)


def zstd_bytes(codes: Int[np.ndarray, "out in"], bits: int) -> int:
    """The bytes of codes of ``bits`` bits by zstd: a byte for each code, or the codes packed to whole bytes, the smaller."""
    flat = codes.astype(np.uint8).ravel()
    dense = np.packbits(np.unpackbits(flat[:, None], axis=1)[:, 8 - bits :])
    packers = zstandard.ZstdCompressor(compression_params=_NO_MATCHES), zstandard.ZstdCompressor(level=3)
    return min(len(packer.compress(one.tobytes())) for packer in packers for one in (flat, dense))
