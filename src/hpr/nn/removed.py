"""Stand where modules stood whose weight, or some of its rows, lost its effect: their layer reuses what one below computes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hpr.anatomy.lookup import weight_of
from hpr.nn.bank import FactorBank
from hpr.nn.linear import SharedLinear
from hpr.nn.site import SharedSite, shell_of
from hpr.plans.terms import Term


class Vanished(SharedSite):
    """x (…, in) → zeros (…, out), ids (…) → zeros (…, d), without a multiply; anything else, like a norm, lets x pass."""

    def __init__(self, bank: FactorBank, source: nn.Module, path: str):
        nn.Module.__init__(self)
        self._bank = (bank,)
        self._shell = (shell_of(source),)
        self.terms = ()
        self.path = path
        self.out_features, self.in_features = 0, 0
        if isinstance(source, nn.Linear | Conv1D | nn.Embedding):
            self.out_features, self.in_features = weight_of(source).shape
        self.register_buffer("weight", torch.zeros(1, dtype=bank.dtype))
        self.train(source.training)

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        if isinstance(self.shell, nn.Embedding):
            return self.weight.new_zeros(()).expand(*x.shape, self.in_features)
        return x.new_zeros(()).expand(*x.shape[:-1], self.out_features) if self.out_features else x


class SomeRows(SharedLinear):
    """A Linear of which only the rows of its terms, in order and each a whole matrix, have an effect: all in one product."""

    def forward(self, x: Tensor) -> Tensor:
        found = F.linear(x, torch.cat([self.bank[term.u].dense() for term in self.terms]))
        pieces: list[Tensor] = []
        end, taken = 0, 0
        for term in self.terms:
            start, stop = term.rows or (0, self.out_features)
            pieces += [found.new_zeros(()).expand(*found.shape[:-1], start - end)] if start > end else []
            pieces.append(found[..., taken : taken + stop - start])
            end, taken = stop, taken + stop - start
        if end < self.out_features:
            pieces.append(found.new_zeros(()).expand(*found.shape[:-1], self.out_features - end))
        total = torch.cat(pieces, dim=-1)
        return total if self.bias is None else total + self.bias


def only_rows(terms: Sequence[Term]) -> bool:
    """Whether terms are runs of rows as ``SomeRows`` reads them: whole matrices, in order, that do not overlap."""
    plain = all(term.v is None and not term.row_scale and not term.column_scale for term in terms)
    runs = [term.rows for term in terms if term.rows is not None]
    ordered = all(one[1] <= other[0] for one, other in itertools.pairwise(runs))
    return bool(terms) and len(runs) == len(terms) and plain and ordered
