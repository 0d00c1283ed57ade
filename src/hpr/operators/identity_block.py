"""Rewrite products U·V so that one factor contains an identity block, which is not stored (see ``FactorShape``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import scipy.linalg
import torch
from jaxtyping import Float, Int
from torch import Tensor

from hpr.plans.terms import Term


def store(values: Mapping[str, Tensor], terms: Iterable[Term]) -> dict[str, Tensor]:
    """The factors in the form that the bank stores: without identity blocks, and with the row order as ``name.order``.

    All products U V stay the same. For a term with identity "u", U = U' T and U' contains an identity block; U' and T V replace
    U and V. For identity "v", V = T V' and V' contains an identity block; U T and V' replace U and V. The same T changes every
    partner of a factor, and a pair of factors that several sites share is changed once.
    """
    stored = dict(values)
    changed: dict[str, Tensor] = {}
    done: set[tuple[str, str]] = set()
    for term in terms:
        if not term.identity or term.v is None or (term.u, term.v) in done:
            continue
        done.add((term.u, term.v))
        factor, partner = (term.u, term.v) if term.identity == "u" else (term.v, term.u)
        if factor not in changed:
            tall = values[factor] if term.identity == "u" else values[factor].T
            rest, order, changed[factor] = divide(tall)
            stored[factor] = rest if term.identity == "u" else rest.T
            stored[f"{factor}.order"] = order
        change = changed[factor]
        stored[partner] = change @ values[partner] if term.identity == "u" else values[partner] @ change.T
    return stored


def divide(
    tall: Float[Tensor, "n r"],
) -> tuple[Float[Tensor, "n_minus_r r"], Int[Tensor, " n"], Float[Tensor, "r r"]]:
    """Factor F (n, r) as F = [I; rest][order] · T. Returns rest (n − r, r), order (n,) and T (r, r).

    T consists of r rows of F. QR with column pivoting chooses these rows, which keeps the entries of ``rest`` small (Cheng et
    al. 2005). The rows of an F of lower rank than r depend on T as well, so the pseudo-inverse finds them.
    """
    rows, rank = tall.shape
    _, _, pivots = scipy.linalg.qr(tall.T.cpu().numpy(), mode="economic", pivoting=True)
    chosen = torch.as_tensor(np.ascontiguousarray(pivots[:rank]), dtype=torch.int64)
    others = torch.ones(rows, dtype=torch.bool)
    others[chosen] = False
    order = torch.empty(rows, dtype=torch.int64)
    order[chosen] = torch.arange(rank)
    order[others] = torch.arange(rank, rows)
    square = tall[chosen.to(tall.device)]
    rest, singular = torch.linalg.solve_ex(square, tall[others.to(tall.device)], left=False)
    if int(singular) or not bool(torch.isfinite(rest).all()):
        rest = tall[others.to(tall.device)] @ torch.linalg.pinv(square)
    return rest, order, square
