"""Modules that compute with the integers of coded weights, in the operators that runtimes of ONNX have for them.

A coded weight is diag(rows) · codes · diag(columns). The column scales multiply the input, which the runtime then rounds to
eight bits; the codes multiply it as they are; the row scales multiply the sums (``DynamicQuantizeMatMul``, or ``MatMulNBits``
for models that write, both operators of ONNX Runtime). No weight is rounded a second time. Moving scales from weights into
inputs is the idea of SmoothQuant (arXiv 2211.10438); here they are those of the plan.

Outside an export they compute what the runtime will.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.onnx.ops import symbolic

from hpr.coding.codes import Codes, Product, half_octaves

LARGEST = 127  # of a code that a runtime multiplies by; what is beyond it is kept apart
_BLOCKS = (128, 64, 32, 16)  # columns that share a scale in MatMulNBits: as many as may be, since our scales differ by row only
_MOST_FAR = 1 / 4  # of the columns (or rows) of a weight: with more of them, floats take fewer bytes and less time
_EIGHT_BITS = 4  # MatMulNBits' name of the accuracy at which it rounds the input to eight bits


class FarColumns(nn.Module):
    """What is left of codes beyond ±127, ``rest`` (wide, out), for the input columns ``wide`` that have such codes."""

    wide: Tensor
    rest: Tensor
    place: Tensor

    def __init__(self, left: Int[np.ndarray, "out in"]):
        super().__init__()
        wide = np.flatnonzero(left.any(0))
        self.register_buffer("wide", torch.from_numpy(wide))
        self.register_buffer("rest", _tensor(_narrow(left[:, wide].T)))
        self.register_buffer("place", torch.from_numpy(np.eye(left.shape[1], dtype=np.int8)[wide]), persistent=False)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return x.index_select(-1, self.wide) @ self.rest.to(x.dtype)

    def look_up(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n in"]:
        """Rows of what is left, by number."""
        return self.rest.index_select(1, ids).T.to(torch.float32) @ self.place.to(torch.float32)


class FarRows(nn.Module):
    """The same by rows: ``number`` (out,) says which row of ``rest`` (1 + far, in) is left of a row; row 0 is zero."""

    number: Tensor
    rest: Tensor

    def __init__(self, left: Int[np.ndarray, "out in"]):
        super().__init__()
        far = np.flatnonzero(left.any(1))
        number = torch.zeros(len(left), dtype=torch.int32)
        number[torch.from_numpy(far)] = torch.arange(1, len(far) + 1, dtype=torch.int32)
        self.register_buffer("number", number)
        self.register_buffer("rest", _tensor(_narrow(np.concatenate([np.zeros_like(left[:1]), left[far]]))))

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return (x @ self.rest.to(x.dtype).T).index_select(-1, self.number)

    def look_up(self, ids: Int[Tensor, " n"]) -> Float[Tensor, "n in"]:
        """Rows of what is left, by number."""
        return self.rest.index_select(0, self.number.index_select(0, ids)).to(torch.float32)


class IntegerProduct(nn.Module):
    """x (…, in) → diag(rows) · codes · diag(columns) · x + bias, (…, out).

    ``codes`` is (in, out), int8. What is left of codes beyond ±127 (``far``) multiplies the input as it is. ``tokens``: whether
    the product is with few vectors at a time, as when a model writes; the codes are then stored as ``MatMulNBits`` wants them,
    (out, blocks, bytes of a block), and the runtime rounds the input by blocks of a vector instead of by the tensor. ``tied``:
    whether a table reads the same codes, which then have eight bits each. A weight with many codes beyond ±127 is multiplied as
    floats, which the runtime makes of the codes when it loads the graph.
    """

    codes: Tensor
    rows: Tensor
    columns: Tensor

    def __init__(
        self,
        found: Codes,
        rows: np.ndarray | None = None,
        columns: np.ndarray | None = None,
        tokens: bool = False,
        tied: bool = False,
    ):
        super().__init__()
        self.is_float = _is_wide(found.values, axis=0)
        values = found.values if self.is_float else found.values.clip(-LARGEST, LARGEST)
        scales = found.scale * half_octaves(found.rows) if rows is None else rows
        self.out_features, self.in_features = values.shape
        blocks = _BLOCKS if tokens and not self.is_float else ()
        self.block = next((size for size in blocks if values.shape[1] % size == 0), 0)
        self.bits = 4 if self.block and not tied and np.abs(values).max() <= 7 else 8
        self.register_buffer("codes", _blocked(values, self.block, self.bits) if self.block else _tensor(_narrow(values.T)))
        self.register_buffer("rows", _floats(np.repeat(scales, values.shape[1] // self.block) if self.block else scales))
        self.register_buffer("columns", _floats(half_octaves(found.columns) if columns is None else columns))
        self.far = _far(found.values - values, by_rows=tokens)

    def forward(self, x: Float[Tensor, "*batch in"], bias: Float[Tensor, " out"] | None = None) -> Float[Tensor, "*batch out"]:
        x = x * self.columns
        if self.is_float:
            y = x @ (self.codes.to(x.dtype) * self.rows)
            return y if bias is None else y + bias
        y = self._by_blocks(x, bias) if self.block else dynamic_product(x, self.codes, self.rows, bias)
        return y if self.far is None else y + self.far(x) * self.rows.view(self.out_features, -1)[:, 0]

    def _by_blocks(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if not torch.compiler.is_exporting():
            weight = _unblocked(self.codes, self.bits) * self.rows.view(self.out_features, -1)[:, :1]
            return torch.nn.functional.linear(x, weight, bias)
        sizes = {"K": self.in_features, "N": self.out_features, "bits": self.bits, "block_size": self.block}
        return symbolic(
            "com.microsoft::MatMulNBits",
            (x, self.codes, self.rows, None, None, bias),
            sizes | {"accuracy_level": _EIGHT_BITS},
            dtype=x.dtype,
            shape=(*x.shape[:-1], self.out_features),
            version=1,
        )


class LowRankIntegerProduct(nn.Module):
    """The same for a weight of low rank: the product with the one factor, and of its result with the other one."""

    def __init__(self, found: Product, tokens: bool = False, tied: bool = False):
        super().__init__()
        whole, bits = found.between()
        between = np.ldexp(whole.astype(np.float64), -bits)
        self.inner = IntegerProduct(found.v, rows=np.ones(found.rank), tokens=tokens)
        self.outer = IntegerProduct(found.u, found.rows(), between, tokens, tied)

    def forward(self, x: Float[Tensor, "*batch in"], bias: Float[Tensor, " out"] | None = None) -> Float[Tensor, "*batch out"]:
        return self.outer(self.inner(x), bias)


class IntegerTable(nn.Module):
    """Rows of diag(rows) · codes · diag(columns) by number. ids (…) → (…, d).

    ``head``: the product of a head that is tied to the table; its codes and what is beyond them are stored once.
    """

    codes: Tensor
    rows: Tensor
    columns: Tensor

    def __init__(self, found: Codes, rows: np.ndarray | None = None, head: IntegerProduct | None = None):
        super().__init__()
        codes = found.values if _is_wide(found.values, axis=1) else found.values.clip(-LARGEST, LARGEST)
        shared = head if head is not None and head.block else None
        self.offset = 0 if shared is None else 128
        self.register_buffer("codes", _tensor(_narrow(codes)) if shared is None else shared.codes)
        self.register_buffer("rows", _floats(found.scale * half_octaves(found.rows) if rows is None else rows))
        self.register_buffer("columns", _floats(half_octaves(found.columns)) if shared is None else shared.columns)
        self.far = _far(found.values - codes, by_rows=True) if shared is None else shared.far

    def forward(self, ids: Int[Tensor, " *batch"]) -> Float[Tensor, "*batch d"]:
        flat = ids.reshape(-1)
        numbers = self.codes.index_select(0, flat).flatten(1).to(self.columns.dtype)
        numbers = numbers - self.offset if self.offset else numbers
        if self.far is not None:
            numbers = numbers + self.far.look_up(flat)
        numbers = numbers * self.rows.index_select(0, flat).unsqueeze(-1) * self.columns
        return numbers.view(*ids.shape, numbers.shape[-1])


class LowRankIntegerTable(nn.Module):
    """The same for a table of low rank: rows of the one factor times the other one."""

    inner: Tensor
    columns: Tensor

    def __init__(self, found: Product, head: LowRankIntegerProduct | None = None):
        super().__init__()
        whole, bits = found.between()
        self.rows = IntegerTable(found.u, found.rows(), None if head is None else head.outer)
        self.rows.columns = _floats(np.ldexp(whole.astype(np.float64), -bits))
        inner = found.v.values if _is_wide(found.v.values, axis=1) else found.v.values.clip(-LARGEST, LARGEST)
        self.register_buffer("inner", _tensor(_narrow(inner)))
        self.register_buffer("columns", _floats(half_octaves(found.v.columns)))
        self.far = _far((found.v.values - inner).T, by_rows=False)

    def forward(self, ids: Int[Tensor, " *batch"]) -> Float[Tensor, "*batch d"]:
        rows = self.rows(ids)
        numbers = rows @ self.inner.to(rows.dtype)
        numbers = numbers if self.far is None else numbers + self.far(rows)
        return numbers * self.columns


def dynamic_product(
    x: Float[Tensor, "*batch in"], codes: Int[Tensor, "in out"], rows: Float[Tensor, " out"], bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "*batch out"]:
    """x · codes · diag(rows) + bias, with x rounded to unsigned eight bits by one scale, as ONNX Runtime defines it."""
    if torch.compiler.is_exporting():
        return symbolic(
            "com.microsoft::DynamicQuantizeMatMul",
            (x, codes, rows, None, bias),
            dtype=x.dtype,
            shape=(*x.shape[:-1], codes.shape[1]),
            version=1,
        )
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = (-low / scale).round().clamp(0, 255)
    rounded = ((x / scale).round() + zero).clamp(0, 255) - zero
    y = (rounded.double() @ codes.double()).to(x.dtype) * (scale * rows)  # whole numbers below 2^53: exact
    return y if bias is None else y + bias


def _far(left: Int[np.ndarray, "out in"], by_rows: bool) -> FarRows | FarColumns | None:
    """What is left of codes; None if nothing is. By rows it may be smaller, but takes a step for each output of each vector."""
    if not left.any():
        return None
    rows, columns = left.any(1).sum() * left.shape[1], left.any(0).sum() * left.shape[0]
    return FarRows(left) if by_rows and rows < columns else FarColumns(left)


def _blocked(values: Int[np.ndarray, "out in"], block: int, bits: int) -> Tensor:
    """Codes as MatMulNBits stores them: (out, blocks, bytes of a block), unsigned; two of four bits are in a byte."""
    unsigned: np.ndarray = (values + (1 << (bits - 1))).astype(np.uint8)
    if bits == 4:
        unsigned = unsigned[:, ::2] | unsigned[:, 1::2] << 4
    return torch.from_numpy(unsigned.reshape(len(values), -1, block * bits // 8))


def _unblocked(codes: Tensor, bits: int) -> Float[Tensor, "out in"]:
    """The codes in blocks as a matrix of float32 again."""
    flat = codes.flatten(1).to(torch.int32)
    if bits == 4:
        flat = torch.stack([flat & 15, flat >> 4], dim=-1).flatten(1)
    return (flat - (1 << (bits - 1))).to(torch.float32)


def _narrow(numbers: np.ndarray) -> np.ndarray:
    """The numbers in the smallest signed type that holds them all."""
    return np.ascontiguousarray(numbers.astype(np.min_scalar_type(-int(np.abs(numbers).max()) - 1)))


def _is_wide(values: Int[np.ndarray, "out in"], axis: int) -> bool:
    """Whether many columns (axis 0) or rows hold codes beyond ±127, so that what is left of them would be about as large."""
    return float((np.abs(values) > LARGEST).any(axis).mean()) > _MOST_FAR


def _tensor(numbers: np.ndarray) -> Tensor:
    return torch.from_numpy(numbers)


def _floats(numbers: np.ndarray) -> Tensor:
    return torch.from_numpy(numbers.astype(np.float32))
