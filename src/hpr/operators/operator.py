"""The operator protocol: what the planner and the fit need to know about one way to store a group of weights.

An operator answers three questions. ``candidate``: how many parameters and how much damage does each rank cost? ``terms``:
which factors does each site multiply and add for the chosen ranks? ``fit``: which values do these factors get?
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from hpr.anatomy.model import Site
from hpr.operators.metric import Measured
from hpr.plans.terms import Term
from hpr.solver.candidates import Candidate, Track

Terms = Mapping[str, tuple[Term, ...]]  # by site name
Ranks = tuple[int, ...]
RowRange = tuple[int, int]  # rows [start, stop) of a weight


class TermsError(ValueError):
    """The terms do not have the form that the operator writes. ``Fits.fit`` turns this error into a ``PlanError``."""


@dataclass(frozen=True)
class RowRuns:
    """How an operator stores an embedding table as runs of consecutive rows. Each run has its own rank.

    ``track`` measures a table and returns a track. The positions of the track are blocks of rows, and every candidate on it
    sets ``Candidate.rows``. ``terms`` receives the chosen runs as (rows, ranks) pairs and returns the terms of the table. It
    returns no terms if all rows are kept.
    """

    track: Callable[[Measured], Track]
    terms: Callable[[Site, Sequence[tuple[RowRange, Ranks]]], tuple[Term, ...]]


def _no_candidate(group: Sequence[Measured]) -> Candidate | None:
    return None


def _no_terms(sites: Sequence[Site], ranks: Ranks) -> dict[str, tuple[Term, ...]]:
    return {site.name: () for site in sites}


@dataclass(frozen=True)
class Operator:
    """One way to store a group of weights. To add one, end a new file with its ``Operator`` and list it in ``registry.py``.

    The three functions run in this order:

    - ``candidate(group)`` measures a group and returns its curve: damage (nats) and parameters at every choice of ranks. It
      returns None if the operator cannot store the group.
    - ``terms(sites, ranks)`` names the factors. It returns the terms of every site for one choice of ranks and computes no
      values. The plan stores these terms. By default every site has no terms, which keeps the original weight.
    - ``fit(group, terms)`` computes the factors. It reads their names and ranks from the terms of a plan and returns their
      values (float64) by factor name. It raises ``TermsError`` for terms that ``terms`` would not return.

    The flags tell the planner when to try the operator:

    - ``shared``: True if it stores groups of two or more sites, False if it stores single sites.
    - ``merges``: True if one matrix replaces the weights of all sites. The planner tries such an operator only on similar
      weights (see ``tie.alike``), or if the user names it.
    - ``quick``: True if ``candidate`` is cheap. The alignment check and the search for groups of distant layers call quick
      operators only, because the damage of the other shared operators lies between that of the quick ones.
    - ``helped_by``: the values of ``AlignTarget.align_to`` that lower the damage of this operator.
    - ``rows``: set if the operator stores embedding tables as runs of rows, otherwise None.
    - ``needs_layer_state``: True if the operator stores the remaining rows of a dropped or reused layer. The planner never
      chooses it; the layer state of a plan does.

    >>> Operator("mean", fit=lambda group, terms: {}, shared=True).merges
    False
    """

    name: str
    fit: Callable[[Sequence[Measured], Terms], dict[str, Tensor]]
    candidate: Callable[[Sequence[Measured]], Candidate | None] = _no_candidate
    terms: Callable[[Sequence[Site], Ranks], dict[str, tuple[Term, ...]]] = _no_terms
    shared: bool = False
    merges: bool = False
    quick: bool = False
    helped_by: tuple[str, ...] = ()
    rows: RowRuns | None = None
    needs_layer_state: bool = False


def only_site(group: Sequence[Measured]) -> Measured:
    """The site of a group with one member. Raises ``TermsError`` if the group has more members."""
    if len(group) != 1:
        raise TermsError(f"{len(group)} sites share factors that belong to one site")
    return group[0]


def terms_of(terms: Terms, site: Measured, count: int) -> tuple[Term, ...]:
    """The terms of a site. Raises ``TermsError`` if their number is not ``count``."""
    site_terms = terms[site.site.name]
    if len(site_terms) != count:
        raise TermsError(f"{site.site.name} has {len(site_terms)} terms, not {count}")
    return site_terms


def low_rank_factors(term: Term) -> tuple[str, str, int]:
    """The factor names of U and V of a term, and its rank. Raises ``TermsError`` for a term that is one whole matrix."""
    if term.v is None or term.rank is None:
        raise TermsError(f"the term of {term.u} has no v and rank")
    return term.u, term.v, term.rank


def whole_matrix(term: Term) -> str:
    """The factor name of a term that is one whole matrix. Raises ``TermsError`` for a product of two factors."""
    if term.v is not None:
        raise TermsError(f"the term of {term.u} is a product of two factors, not one matrix")
    return term.u
