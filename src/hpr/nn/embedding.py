"""An embedding table that reads shared factors."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from hpr.nn.bank import FactorBank
from hpr.nn.site import SharedSite
from hpr.plans.terms import Term


class SharedEmbedding(SharedSite):
    """Rows of Σ_j diag(r) U V diag(c), looked up by id without building the table. ids (…) → (…, d)."""

    def __init__(self, bank: FactorBank, terms: Sequence[Term], source: nn.Embedding, path: str = ""):
        SharedSite.__init__(self, bank, terms, source, path)
        self.num_embeddings = source.num_embeddings
        self.embedding_dim = source.embedding_dim
        self.padding_idx = source.padding_idx

    def forward(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch d"]:
        total: Tensor | None = None
        for term in self.terms:
            start, stop = term.rows or (0, self.out_features)
            local = ids - start
            if (start, stop) != (0, self.out_features):  # no clamp at the table's ends: an id beyond it still raises
                last = None if stop == self.out_features else stop - start - 1
                local = local.clamp(min=0 if start else None, max=last)
            y = self.bank[term.u].lookup(local)
            if term.row_scale is not None:
                y = y * F.embedding(local, self.bank[term.row_scale].weight.T)
            if (start, stop) != (0, self.out_features):
                y = y * ((ids >= start) & (ids < stop)).unsqueeze(-1)
            if term.v is not None:
                y = F.linear(y, self.bank[term.v].dense().T)
            if term.column_scale is not None:
                y = y * self.bank[term.column_scale].weight[0]
            total = y if total is None else total + y
        assert total is not None
        return total
