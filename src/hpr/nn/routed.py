"""A Linear whose terms are weighed by routers, which see its input. Experimental."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from hpr.nn.linear import SharedLinear
from hpr.plans.product import component_weights
from hpr.plans.terms import Route, Term


class RoutedLinear(SharedLinear):
    """y = Σ_j diag(r) U diag(α_j(x)) V diag(c) x + bias. x (…, in) → y (…, out). See ``hpr.nn.router`` for α."""

    def set_terms(self, terms: Sequence[Term]) -> None:
        super().set_terms(terms)
        routes = [term.route for term in self.terms if term.route is not None]
        self.routes: dict[str, Route] = {route.router: route for route in reversed(routes)}
        self.experts = [route.expert for route in routes]
        same = len({(route.router, route.per) for route in routes}) == 1 and len(routes) == len(self.terms)
        whole = all(term == Term(term.u, route=term.route) for term in self.terms) and None not in self.experts
        self.mergeable = whole and same and routes[0].per == "sequence"

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        alphas = {name: self.bank.routing(route, self.bank[name].weight, x, self.path) for name, route in self.routes.items()}
        if x.dim() == 3 and self.merges(x.shape[1]):
            return self._merged(x, *alphas.values())
        total: Tensor | None = None
        for number, (term, padding) in enumerate(zip(self.terms, self.paddings, strict=True)):
            y = self.inner(x, term)
            if term.route is not None:
                y = y * component_weights(alphas[term.route.router], term.route, term.rank)
            y = self.outer(y, term, self.bias if number == self.adds_bias else None)
            y = F.pad(y, padding) if padding else y
            total = y if total is None else total + y
        assert total is not None
        return total if self.bias is None or self.adds_bias is not None else total + self.bias

    def merges(self, positions: int) -> bool:
        """Whether one weight is put together for each sequence first: cheaper than a product with every expert's matrix."""
        return self.mergeable and positions * len(self.experts) > positions + len(self.experts)

    def _merged(self, x: Tensor, alpha: Tensor) -> Tensor:
        matrices = torch.stack([self.bank[term.u].dense() for term in self.terms])
        merged = torch.einsum("bk,koi->bio", alpha[:, 0, self.experts], matrices)
        return x @ merged if self.bias is None else torch.baddbmm(self.bias, x, merged)
