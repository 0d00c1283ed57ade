"""Compute the weight matrix of a site from its terms and the values of their factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from hpr.errors import HprError, PlanError
from hpr.plans.terms import Route, Term


def product(
    terms: Sequence[Term], values: Mapping[str, Tensor], out_features: int, in_features: int
) -> Float[Tensor, "out in"]:
    """The matrix Σ_j diag(r_j) U_j diag(α_j) V_j diag(c_j), with the dtype and device of the first factor.

    ``values``: factor name → the full matrix, an identity block included; a diagonal is (1, n). If the router of a term is
    among them, the term is weighed by its α, which must not depend on the input (``HprError`` if it does); a router that is
    missing counts as 0, for which every α is 1.

    >>> values = {"u": torch.ones(3, 1), "v": torch.ones(1, 2)}
    >>> product([Term("u", "v", rank=1)], values, 3, 2).shape
    torch.Size([3, 2])
    """
    total = values[terms[0].u].new_zeros(out_features, in_features)
    for term in terms:
        matrix = values[term.u]
        if term.route is not None and term.route.router in values:
            matrix = matrix * component_weights(fixed_weights(term.route, values[term.route.router]), term.route, term.rank)
        if term.v is not None:
            matrix = matrix @ values[term.v]
        if term.row_scale is not None:
            matrix = matrix * values[term.row_scale].T
        if term.column_scale is not None:
            matrix = matrix * values[term.column_scale]
        start, stop = term.rows or (0, out_features)
        total[start:stop] = total[start:stop] + matrix
    return total


def fixed_weights(route: Route, router: Float[Tensor, "experts 1"]) -> Float[Tensor, " experts"]:
    """α of a fixed router. Raises ``HprError`` for a router that depends on the input."""
    if route.per != "fixed":
        raise HprError(f"the router {route.router} depends on the input: use hpr.extras.collapse on the model first")
    return route.experts * router[:, 0].softmax(-1)


def component_weights(
    alpha: Float[Tensor, "*batch experts"], route: Route, rank: int | None
) -> Float[Tensor, "*batch components"]:
    """The number that multiplies each rank component of a term (see ``Route``).

    Returns (…, rank), or (…, 1) if the route names one expert. Raises ``PlanError`` for a term that has neither a rank nor an
    expert.
    """
    if route.expert is not None:
        return alpha[..., route.expert : route.expert + 1]
    if rank is None:
        raise PlanError(f"the route to {route.router} names no expert and its term has no rank: give the route an expert")
    return alpha.repeat(*[1] * (alpha.dim() - 1), -(-rank // route.experts))[..., :rank]
