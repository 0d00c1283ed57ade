"""What a decoder knows of a weight before its codes: exponents of the scales, and how large the codes are expected to be."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from jaxtyping import Int

from hpr.coding.codes import Codes

SMALLEST, LARGEST = -12, 40  # expected sizes: half octaves of the root mean square of codes
_FIELDS = ("flat", "height", "width", "scale", "centre", "size", "row", "column", "row_size", "column_size")


def _none() -> np.ndarray:
    return np.zeros(0, np.int32)


@dataclass(frozen=True, eq=False)
class Layout:
    """One weight (height, width) without its codes; all numbers but ``scales`` are integers.

    A flat weight, a vector with one grid, has one expected ``size``; its codes are stored relative to their ``centre``.
    For any other weight the expected size of a code is ``size`` less the exponents of its scale, or, more exactly, the sum
    of its row's and its column's size. Exponents are stored relative to their medians, those of sizes after those of the
    scales are added, since numbers with fine grids have large codes.
    """

    flat: bool
    height: int
    width: int
    scale: float
    centre: int
    size: int
    medians: tuple[int, int, int, int]  # of rows, columns, row sizes, column sizes
    rows: Int[np.ndarray, " height"] = field(default_factory=_none)
    columns: Int[np.ndarray, " width"] = field(default_factory=_none)
    row_sizes: Int[np.ndarray, " height"] = field(default_factory=_none)
    column_sizes: Int[np.ndarray, " width"] = field(default_factory=_none)

    @classmethod
    def of(cls, codes: Codes) -> Layout:
        """The layout of a weight."""
        (height, width), rows, columns = codes.values.shape, codes.rows, codes.columns
        if height == 1 and not np.ptp(columns):
            centre = int(np.median(codes.values))
            size = int(_exponent(_root_mean_square(codes.values - centre)))
            return cls(True, height, width, codes.scale, centre, size, (int(rows[0]), int(columns[0]), 0, 0))
        whole = _root_mean_square(codes.values)
        size = int(_exponent(whole)) + round(float(rows.mean() + columns.mean()))
        row_sizes = _exponent(_root_mean_square(codes.values, 1))
        column_sizes = _exponent(_root_mean_square(codes.values, 0) / max(whole, 1e-6))
        vectors = (rows, columns, row_sizes + rows, column_sizes + columns)
        row, column, row_size, column_size = (int(np.median(vector)) for vector in vectors)
        medians = (row, column, row_size, column_size)
        return cls(False, height, width, codes.scale, 0, size, medians, rows, columns, row_sizes, column_sizes)

    @property
    def numbers(self) -> int:
        """How many codes the weight has."""
        return self.height * self.width

    def expected(self, sized: bool) -> Int[np.ndarray, " numbers"]:
        """The expected size of every code in half octaves; ``sized``: from sizes by row and column."""
        if self.flat:
            return np.full(self.numbers, self.size)
        if sized:
            return (self.row_sizes[:, None] + self.column_sizes).ravel()
        return (self.size - self.rows[:, None] - self.columns).ravel()

    def codes(self, values: Int[np.ndarray, " numbers"]) -> Codes:
        """The weight's codes from what a stream stores for them."""
        rows, columns = self.rows, self.columns
        if self.flat:
            rows, columns = np.full(self.height, self.medians[0], np.int32), np.full(self.width, self.medians[1], np.int32)
        return Codes(values.reshape(self.height, self.width) + np.int32(self.centre), rows, columns, self.scale)


def exponents(layouts: Sequence[Layout], sized: bool) -> list[Int[np.ndarray, " n"]]:
    """The symbols that a stream holds before the codes: by kind, those of all weights that are not flat."""
    found: list[list[np.ndarray]] = [[], [], [], []]
    for layout in layouts:
        if not layout.flat:
            sizes = (layout.row_sizes + layout.rows, layout.column_sizes + layout.columns)
            for kind, (vector, median) in enumerate(zip((layout.rows, layout.columns, *sizes), layout.medians, strict=True)):
                found[kind].append(vector - np.int32(median))
    return [np.concatenate(kind) for kind in found[: 4 if sized else 2] if kind]


def filled(layouts: Sequence[Layout], sized: bool, take: Callable[[int], Int[np.ndarray, " n"]]) -> list[Layout]:
    """The layouts with their exponents, which ``take`` reads from a stream, so many at a time."""
    lengths = [(layout.height, layout.width) for layout in layouts if not layout.flat]
    if not lengths:
        return list(layouts)
    parts: list[Iterator[np.ndarray]] = []
    for kind in range(4 if sized else 2):
        counts = [shape[kind % 2] for shape in lengths]
        parts.append(iter(np.split(take(sum(counts)), np.cumsum(counts)[:-1])))
    return [layout if layout.flat else _filled(layout, [next(part) for part in parts]) for layout in layouts]


def _filled(layout: Layout, vectors: list[np.ndarray]) -> Layout:
    absolute = [vector + np.int32(median) for vector, median in zip(vectors, layout.medians, strict=False)]
    sizes = [size - scale for size, scale in zip(absolute[2:], absolute, strict=False)]
    return replace(layout, **dict(zip(("rows", "columns", "row_sizes", "column_sizes"), absolute[:2] + sizes, strict=False)))


def describe(layouts: Sequence[Layout]) -> bytes:
    """All but the exponents. Scales stand apart, since weights of one model share theirs."""
    scales = sorted({layout.scale for layout in layouts})
    fields = np.array(
        [
            (layout.flat, layout.height, layout.width, scales.index(layout.scale), layout.centre, layout.size, *layout.medians)
            for layout in layouts
        ],
        "<i4",
    )
    return struct.pack(f"<II{len(scales)}d", len(layouts), len(scales), *scales) + fields.T.tobytes()


def described(description: bytes) -> tuple[list[Layout], bytes]:
    """The layouts that ``describe`` wrote, without exponents, and the bytes after them."""
    count, kinds = struct.unpack_from("<II", description)
    scales = struct.unpack_from(f"<{kinds}d", description, 8)
    start = 8 + 8 * kinds
    table = np.frombuffer(description, "<i4", len(_FIELDS) * count, start).reshape(len(_FIELDS), count)
    layouts = [
        Layout(bool(flat), height, width, scales[scale], centre, size, tuple(medians))
        for flat, height, width, scale, centre, size, *medians in table.T.tolist()
    ]
    return layouts, description[start + table.nbytes :]


def _root_mean_square(values: np.ndarray, axis: int | None = None) -> np.ndarray:
    return np.sqrt(np.square(values, dtype=np.float64).mean(axis))


def _exponent(sizes: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(2 * np.log2(np.maximum(sizes, 1e-9))), 2 * SMALLEST, LARGEST).astype(np.int32)
