"""A Linear that reads shared factors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hpr.nn.bank import FactorBank
from hpr.nn.site import SharedSite
from hpr.plans.terms import Term


class RowRun(NamedTuple):
    """Output rows [start, stop) and the terms that add up to them; without terms these rows are 0."""

    start: int
    stop: int
    terms: tuple[Term, ...]


class SharedLinear(SharedSite):
    """y = Σ_j diag(r) U V diag(c) x + bias; the bias is private. x (…, in) → y (…, out).

    ``set_terms`` decides how the product is computed, so that ``forward`` only computes.
    """

    bias: nn.Parameter | None

    def __init__(self, bank: FactorBank, terms: Sequence[Term], source: nn.Module, path: str = ""):
        super().__init__(bank, terms, source, path)
        self.register_parameter("bias", getattr(source, "bias", None))  # the same one: it may be tied (BERT's decoder)

    def set_terms(self, terms: Sequence[Term]) -> None:
        super().set_terms(terms)
        self.runs = runs_of(self.terms, self.out_features)
        self.paddings = [_padding(term, self.out_features) for term in self.terms]
        whole = [number for number, term in enumerate(self.terms) if not self.paddings[number] and term.row_scale is None]
        self.adds_bias = whole[0] if whole and not self.runs else None  # the term whose last product also adds the bias

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if self.runs:
            return self._by_runs(x)
        total: Tensor | None = None
        for number, (term, padding) in enumerate(zip(self.terms, self.paddings, strict=True)):
            y = self.outer(self.inner(x, term), term, self.bias if number == self.adds_bias else None)
            y = F.pad(y, padding) if padding else y
            total = y if total is None else total + y
        assert total is not None
        return total if self.bias is None or self.adds_bias is not None else total + self.bias

    def _by_runs(self, x: Tensor) -> Tensor:
        pieces = [self._sum(x, run.terms) for run in self.runs]
        zero = next(piece for piece in pieces if piece is not None).new_zeros(())
        y = torch.cat(
            [
                zero.expand(*x.shape[:-1], run.stop - run.start) if piece is None else piece
                for run, piece in zip(self.runs, pieces, strict=True)
            ],
            dim=-1,
        )
        return y if self.bias is None else y + self.bias

    def _sum(self, x: Tensor, terms: Sequence[Term]) -> Tensor | None:
        total: Tensor | None = None
        for term in terms:
            y = self.outer(self.inner(x, term), term)
            total = y if total is None else total + y
        return total

    def inner(self, x: Float[Tensor, "*batch in"], term: Term) -> Float[Tensor, "*batch rank"]:
        """V diag(c) x; for a term without ``v`` diag(c) x, (…, in)."""
        y = x if term.column_scale is None else x * self.bank[term.column_scale].weight[0]
        return y if term.v is None else self.bank[term.v](y)

    def outer(
        self, y: Float[Tensor, "*batch rank"], term: Term, bias: Float[Tensor, " rows"] | None = None
    ) -> Float[Tensor, "*batch rows"]:
        """diag(r) U y, plus a bias in the same pass; give one only if the term has no r."""
        y = self.bank[term.u](y, bias)  # adding the bias separately would cost as much as a small product
        return y if term.row_scale is None else y * self.bank[term.row_scale].weight[0]


def runs_of(terms: Sequence[Term], out_features: int) -> tuple[RowRun, ...]:
    """Terms by the output rows that they give, in order, with the gaps between them.

    Empty if one run has all the rows, or if runs overlap: their products then have to be added.
    """
    by_rows: dict[tuple[int, int], list[Term]] = {}
    for term in terms:
        by_rows.setdefault(term.rows or (0, out_features), []).append(term)
    spans = sorted(by_rows)
    if spans == [(0, out_features)] or any(first[1] > second[0] for first, second in itertools.pairwise(spans)):
        return ()
    runs, end = [], 0
    for start, stop in spans:
        runs += [RowRun(end, start, ())] if start > end else []
        runs.append(RowRun(start, stop, tuple(by_rows[start, stop])))
        end = stop
    return (*runs, RowRun(end, out_features, ())) if end < out_features else tuple(runs)


def _padding(term: Term, out_features: int) -> tuple[int, int] | None:
    """The numbers of output rows before and after those of a term; None if the term gives all rows."""
    if term.rows is None or term.rows == (0, out_features):
        return None
    return term.rows[0], out_features - term.rows[1]
