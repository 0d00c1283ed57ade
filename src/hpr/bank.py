"""Where factors live, and the Linear and Embedding that read them.

Each factor is one plain bias-free Linear in a ``FactorBank`` that hangs on the base model, so that a checkpoint's prefixes
resolve from ``AutoModel`` and from head classes alike. A site holds the bank *unregistered* (inside a tuple) and looks its
factors up by name at every call: references cached at build time go stale when parameters are replaced on load, by PEFT
or by FSDP. Parameters are shared, never modules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpr.planning.plan import Term

BANK = "hpr_bank"


class FactorBank(nn.Module):
    """Factors by name, each stored once. Shapes: matrices (rows, columns); diagonals (n,), stored as (1, n)."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype | None = None):
        super().__init__()
        self.factors = nn.ModuleDict()
        for name, shape in shapes.items():
            rows, columns = (1, shape[0]) if len(shape) == 1 else shape
            self.factors[module_name(name)] = nn.utils.skip_init(nn.Linear, columns, rows, bias=False, dtype=dtype)

    def __getitem__(self, name: str) -> Tensor:
        return self.factors[module_name(name)].weight  # type: ignore[return-value]

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Copy fitted factors in; a diagonal may come as (n,)."""
        for name, value in values.items():
            self[name].copy_(value.reshape(self[name].shape))


def module_name(factor: str) -> str:
    """A factor's key in the bank: module names cannot hold dots."""
    return factor.replace(".", "-")


class SharedSite(nn.Module):
    """What a shared Linear and a shared Embedding have in common: their terms and the bank.

    The one-element ``weight`` buffer makes loading without hpr fail on its shape instead of silently re-initialising, and
    serves models that read ``module.weight.dtype``.
    """

    weight: Tensor

    def __init__(self, bank: FactorBank, terms: Sequence[Term], out_features: int, in_features: int):
        super().__init__()
        self._bank = (bank,)
        self.terms = tuple(terms)
        self.out_features = out_features
        self.in_features = in_features
        self.register_buffer("weight", torch.zeros(1, dtype=next(iter(bank.parameters())).dtype))

    @property
    def bank(self) -> FactorBank:
        return self._bank[0]

    def dense_weight(self) -> Tensor:
        """The (out, in) matrix that the terms add up to."""
        total = torch.zeros(self.out_features, self.in_features, dtype=self.weight.dtype, device=self.weight.device)
        for term in self.terms:
            product = self.bank[term.u]
            if term.v is not None:
                product = product @ self.bank[term.v]
            if term.row_scale is not None:
                product = product * self.bank[term.row_scale].T
            if term.column_scale is not None:
                product = product * self.bank[term.column_scale]
            start, stop = term.rows or (0, self.out_features)
            total[start:stop] = total[start:stop] + product
        return total

    def extra_repr(self) -> str:
        ranks = ", ".join("full" if term.rank is None else str(term.rank) for term in self.terms)
        return f"out_features={self.out_features}, in_features={self.in_features}, ranks=[{ranks}]"

    def flops_per_row(self) -> int:
        """Multiply-adds × 2 for one input row."""
        return 2 * sum(math.prod(self.bank[name].shape) for term in self.terms for name in (term.u, term.v) if name)


class SharedLinear(SharedSite):
    """y = Σ_j diag(r) U V diag(c) x + bias; the bias is private. x (…, in) → y (…, out)."""

    bias: nn.Parameter | None

    def __init__(self, bank: FactorBank, terms: Sequence[Term], source: nn.Module, out_features: int, in_features: int):
        super().__init__(bank, terms, out_features, in_features)
        bias = getattr(source, "bias", None)
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach().clone()))

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor | None = None
        for term in self.terms:
            hidden = x if term.column_scale is None else x * self.bank[term.column_scale][0]
            if term.v is not None:
                hidden = F.linear(hidden, self.bank[term.v])
            y = F.linear(hidden, self.bank[term.u])
            if term.row_scale is not None:
                y = y * self.bank[term.row_scale][0]
            if term.rows is not None and term.rows != (0, self.out_features):
                y = F.pad(y, (term.rows[0], self.out_features - term.rows[1]))
            total = y if total is None else total + y
        assert total is not None
        return total if self.bias is None else total + self.bias


class SharedEmbedding(SharedSite):
    """Rows of Σ_j U V looked up by id, without ever building the table. ids (…) → (…, d)."""

    def __init__(self, bank: FactorBank, terms: Sequence[Term], source: nn.Embedding):
        super().__init__(bank, terms, source.num_embeddings, source.embedding_dim)
        self.num_embeddings = source.num_embeddings
        self.embedding_dim = source.embedding_dim
        self.padding_idx = source.padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        total: Tensor | None = None
        for term in self.terms:
            start, stop = term.rows or (0, self.out_features)
            inside = (ids >= start) & (ids < stop)
            local = (ids - start).clamp(0, stop - start - 1)
            y = F.embedding(local, self.bank[term.u])
            if term.row_scale is not None:
                y = y * F.embedding(local, self.bank[term.row_scale].T)
            if (start, stop) != (0, self.out_features):
                y = y * inside.unsqueeze(-1)
            if term.v is not None:
                y = F.linear(y, self.bank[term.v].T)
            if term.column_scale is not None:
                y = y * self.bank[term.column_scale][0]
            total = y if total is None else total + y
        assert total is not None
        return total
