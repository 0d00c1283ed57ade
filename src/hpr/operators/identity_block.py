"""Rewriting products U·V so that one factor holds an identity block that need not be stored (see ``FactorShape``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import scipy.linalg
import torch
from torch import Tensor

from hpr.plans.terms import Term


def store(values: Mapping[str, Tensor], terms: Iterable[Term]) -> dict[str, Tensor]:
    """Factors as the bank stores them: identity blocks taken out, ``name.order`` added, every product unchanged.

    A factor with an identity block is divided by a square matrix T, and every partner it is multiplied with by T's inverse,
    once, however many sites share the pair.
    """
    stored = dict(values)
    changed: dict[str, Tensor] = {}
    done: set[tuple[str, str]] = set()
    for term in terms:
        if not term.identity or term.v is None or (term.u, term.v) in done:
            continue
        done.add((term.u, term.v))
        own, partner = (term.u, term.v) if term.identity == "u" else (term.v, term.u)
        if own not in changed:
            tall = values[own] if term.identity == "u" else values[own].T
            rest, order, changed[own] = divide(tall)
            stored[own] = rest if term.identity == "u" else rest.T
            stored[f"{own}.order"] = order
        change = changed[own]
        stored[partner] = change @ values[partner] if term.identity == "u" else values[partner] @ change.T
    return stored


def divide(tall: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """F (n, r) = [I; rest][order] · T: returns rest (n − r, r), order (n,) and T (r, r).

    Rows are chosen by QR with column pivoting, which keeps the entries of the rest small (Cheng et al. 2005).
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
    return torch.linalg.solve(square, tall[others.to(tall.device)], left=False), order, square
