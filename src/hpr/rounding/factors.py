"""The metric of shared factors: what a change of a stored factor costs, from the moments of the sites that read it.

A site whose weight is diag(r) · U · V · diag(c) costs ½ N tr(G E A Eᵀ) for a change E. A change of U alone is then read through
G, with its rows scaled by r, and through V A Vᵀ; a change of V is read through Uᵀ G U and A, with its columns scaled by c. A
factor that several sites read costs the sum of all uses. Its metric is one Kronecker product again, which has the trace of
that sum.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from hpr.anatomy.describe import describe
from hpr.errors import PlanError
from hpr.nn.bank import BANK, Factor, FactorBank, bank_of, module_name, terms_in
from hpr.nn.embedding import SharedEmbedding
from hpr.plans.terms import Term, factors_of, routers_of
from hpr.profiling.profile import Profile, SiteStatistics, pooled
from hpr.rounding.whitening import damped_moments, times


def site_of(factor: str) -> str:
    """The path of a factor's weight in a shared model, which is a site like others for rounding."""
    return f"{BANK}.factors.{module_name(factor)}"


def factor_profile(student: nn.Module, profile: Profile, dampings: tuple[float, float]) -> Profile:
    """The profile of a shared model: of the sites that it kept, and of its factors. All moments are damped.

    ``profile``: that of the original, aligned as the plan says. Raises ``PlanError`` for a model with routers, whose factors
    have no metric that holds for every input.
    """
    bank, anatomy = bank_of(student), describe(student)
    sites = {
        site.name: _unread() if site.name.startswith(f"{BANK}.") else _kept(site.kind, profile.sites[site.name], dampings)
        for site in anatomy.sites
    }
    if bank is not None:
        for factor, uses in _uses(student, bank, profile, dampings).items():
            traces = [use.fisher_trace for use in uses]
            together = SiteStatistics(*pooled(uses, traces), sum(traces)) if len(uses) > 1 else uses[0]
            sites[site_of(factor)] = _stored(bank[factor], together)
    names = {name for name, _ in student.named_parameters()}  # a dropped layer has none of its own any more
    others = {name: sensitivity for name, sensitivity in profile.others.items() if name in names}
    return replace(profile, fingerprint=anatomy.fingerprint, sites=sites, others=others)


def _unread() -> SiteStatistics:
    nothing = torch.zeros(1, dtype=torch.float64)
    return SiteStatistics(nothing, nothing, 0.0)


def _kept(kind: str, statistics: SiteStatistics, dampings: tuple[float, float]) -> SiteStatistics:
    """The statistics of a site that was kept, damped; frequencies of tokens stay, since rounding smooths them itself."""
    if not statistics.has_gradient:
        return statistics
    left, right = damped_moments(kind, statistics, dampings)
    return replace(statistics, left=statistics.left if kind == "embedding" else left, right=right)


def _uses(
    student: nn.Module, bank: FactorBank, profile: Profile, dampings: tuple[float, float]
) -> dict[str, list[SiteStatistics]]:
    """Factor → its statistics for each of its uses that the objective reads."""
    uses: dict[str, list[SiteStatistics]] = defaultdict(list)
    seen: set[str] = set()
    for module in student.modules():
        for path, terms in terms_in(module).items():
            if not terms or path in seen:  # a removed module, or one that is tied to a site that was seen
                continue
            statistics = profile.sites[path]
            if not statistics.has_gradient:
                continue
            seen.add(path)
            if routers := routers_of(terms):
                raise PlanError(
                    f"{path} has the router {routers[0]}, so its factors have no fixed metric: plan without routers"
                )
            kind = "embedding" if isinstance(module, SharedEmbedding) else "linear"
            left, right = damped_moments(kind, statistics, dampings)
            known = replace(statistics, left=left, right=right)
            values = {name: bank[name].dense().detach().to(known.right) for name in factors_of(terms)}
            for term in terms:
                for factor, use in _of_term(term, values, known):
                    uses[factor].append(use)
    return uses


def _of_term(term: Term, values: Mapping[str, Tensor], site: SiteStatistics) -> Iterator[tuple[str, SiteStatistics]]:
    """The factors of a term, each with its statistics in this use."""
    rows = slice(*term.rows) if term.rows else slice(None)
    left = site.left[rows] if site.left.dim() == 1 else site.left[rows, rows]
    u, v = values[term.u], None if term.v is None else values[term.v]
    r = None if term.row_scale is None else values[term.row_scale][0]
    c = None if term.column_scale is None else values[term.column_scale][0]
    outer, inner = _scaled(left, r), _scaled(site.right, c)
    if v is None:
        yield term.u, SiteStatistics(outer, inner, site.rows)
    else:
        yield term.u, SiteStatistics(outer, v @ times(inner, v.T), site.rows)
        yield term.v or "", SiteStatistics(u.T @ times(outer, u), inner, site.rows)
    matrix, one = u if v is None else u @ v, left.new_ones(1)
    if term.row_scale is not None:
        yield term.row_scale, SiteStatistics(one, _hadamard(left, matrix @ times(inner, matrix.T)), site.rows)
    if term.column_scale is not None:
        yield term.column_scale, SiteStatistics(one, _hadamard(site.right, matrix.T @ times(outer, matrix)), site.rows)


def _scaled(moment: Tensor, scale: Tensor | None) -> Tensor:
    """diag(scale) · moment · diag(scale)."""
    if scale is None:
        return moment
    return moment * scale.square() if moment.dim() == 1 else scale[:, None] * moment * scale


def _hadamard(moment: Tensor, other: Tensor) -> Tensor:
    """The products of the entries of a moment, which may be diagonal, with those of a full one."""
    return moment * (other.diagonal() if moment.dim() == 1 else other)


def _stored(factor: Factor, statistics: SiteStatistics) -> SiteStatistics:
    """The statistics of the rows or columns of a factor that are stored; those of an identity block are exact."""
    shape = factor.shape
    if not shape.identity:
        return statistics
    by_rows = shape.identity == "rows"
    places = factor.order.argsort()[shape.columns if by_rows else shape.rows :].cpu()  # where the stored rows stand
    moment = statistics.left if by_rows else statistics.right
    kept = moment[places] if moment.dim() == 1 else moment[places][:, places]
    return replace(statistics, left=kept) if by_rows else replace(statistics, right=kept)
