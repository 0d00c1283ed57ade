"""The modules that read factors: a Linear and an Embedding, and what is written down of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpr.nn.bank import FactorBank
from hpr.nn.router import weighed
from hpr.nn.site import SharedSite
from hpr.plans.terms import Term, routers_of


class SharedLinear(SharedSite):
    """y = Σ_j α_j(x) diag(r) U V diag(c) x + bias; the bias is private. x (…, in) → y (…, out)."""

    bias: nn.Parameter | None

    def __init__(self, bank: FactorBank, terms: Sequence[Term], source: nn.Module, path: str = ""):
        super().__init__(bank, terms, source, path)
        self.register_parameter("bias", getattr(source, "bias", None))  # the same one: it may be tied (BERT's decoder)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor | None = None
        bias, weights = self.bias, self.weights(x)
        if x.dim() == 3 and self.merges(x.shape[1]):
            experts = [term.route.expert for term in self.terms if term.route is not None]
            alpha = weights[routers_of(self.terms)[0]][:, 0, experts]
            merged = torch.einsum("bk,koi->bio", alpha, torch.stack([self.bank[term.u].dense() for term in self.terms]))
            return x @ merged if bias is None else torch.baddbmm(bias, x, merged)
        for term in self.terms:
            y = x if term.column_scale is None else x * self.bank[term.column_scale].weight[0]
            if term.v is not None:
                y = self.bank[term.v](y)
            if term.route is not None:
                y = y * weighed(weights[term.route.router], term.route, term.rank)
            whole = term.rows is None or term.rows == (0, self.out_features)
            if whole and term.row_scale is None and bias is not None:
                y, bias = self.bank[term.u](y, bias), None  # a pass of its own would cost as much as a small product
            else:
                y = self.bank[term.u](y)
            if term.row_scale is not None:
                y = y * self.bank[term.row_scale].weight[0]
            if not whole and term.rows is not None:
                y = F.pad(y, (term.rows[0], self.out_features - term.rows[1]))
            total = y if total is None else total + y
        assert total is not None
        return total if bias is None else total + bias

    def merges(self, positions: int) -> bool:
        """Whether whole matrices weighed for each sequence are put together first: cheaper than a product with each of them."""
        routes = [term.route for term in self.terms if term.route is not None and term.route.expert is not None]
        whole = all(term == Term(term.u, route=term.route) for term in self.terms)
        same = len({(route.router, route.per) for route in routes}) == 1 and len(routes) == len(self.terms)
        return whole and same and routes[0].per == "sequence" and positions * len(routes) > positions + len(routes)

    def weights(self, x: Tensor) -> dict[str, Tensor]:
        """Router → α (…, experts) for an input x (…, in)."""
        found: dict[str, Tensor] = {}
        for route in (term.route for term in self.terms if term.route is not None):
            if route.router not in found:
                found[route.router] = self.bank.routing(route, self.bank[route.router].weight, x, self.path)
        return found
