"""The operator protocol: everything that the planner and the fit ask about one way to store a group of weights."""

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
    """Terms that an operator cannot fit because it would not have written them. The fit turns this into a ``PlanError``."""


@dataclass(frozen=True)
class RowRuns:
    """How an operator stores an embedding table as runs of rows, each with a rank of its own.

    ``track`` measures a table and returns a track whose positions are blocks of rows; every candidate on it has ``rows``.
    ``terms`` returns the terms of a table for the chosen runs, (rows, ranks) each; no terms mean that all rows are kept.
    """

    track: Callable[[Measured], Track]
    terms: Callable[[Site, Sequence[tuple[RowRange, Ranks]]], tuple[Term, ...]]


def _no_candidate(group: Sequence[Measured]) -> Candidate | None:
    return None


def _no_terms(sites: Sequence[Site], ranks: Ranks) -> dict[str, tuple[Term, ...]]:
    return {site.name: () for site in sites}


@dataclass(frozen=True)
class Operator:
    """One operator. To add one, write a file that ends with its ``Operator`` and list it in ``operators.registry``.

    ``candidate`` measures a group and returns its curve (damage and parameters at every choice of ranks), or None if the
    operator does not apply. ``terms`` returns the terms of every site for one choice of ranks, by default none. ``fit`` returns
    the factors of these terms, float64, by name; it raises ``TermsError`` for terms of another form.

    ``shared``: for groups of two or more sites, otherwise for single sites. ``merges``: one matrix stands for several weights,
    so it is tried only for similar weights (see ``tie.alike``) or if the user names the operator. ``quick``: its curve is cheap
    to measure, and the other shared operators lie between the quick ones; the alignment check and groupings of distant layers
    try quick operators only. ``helped_by``: values of ``AlignTarget.align_to`` that lower its damage. ``rows``: set if it
    stores embedding tables as runs of rows. ``needs_layer_state``: it fits what a dropped or reused layer leaves over, so that
    only layer states lead to it and the planner cannot choose it.

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
    """The one site of a group. Raises ``TermsError`` if other sites share its factors."""
    if len(group) != 1:
        raise TermsError(f"{len(group)} sites share factors that belong to one site")
    return group[0]


def terms_of(terms: Terms, site: Measured, count: int) -> tuple[Term, ...]:
    """The terms of a site. Raises ``TermsError`` if their number is not ``count``."""
    found = terms[site.site.name]
    if len(found) != count:
        raise TermsError(f"{site.site.name} has {len(found)} terms, not {count}")
    return found


def low_rank_factors(term: Term) -> tuple[str, str, int]:
    """Names of U and V of a term, and its rank. Raises ``TermsError`` for a term that is a whole matrix."""
    if term.v is None or term.rank is None:
        raise TermsError(f"the term of {term.u} has no v and rank")
    return term.u, term.v, term.rank


def whole_matrix(term: Term) -> str:
    """The name of the factor of a term that is a whole matrix. Raises ``TermsError`` for a product of two factors."""
    if term.v is not None:
        raise TermsError(f"the term of {term.u} is a product of two factors, not one matrix")
    return term.u
