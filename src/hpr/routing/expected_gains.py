"""The gains to expect from a router, measured on kinds of input before one is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpr.anatomy.describe import describe
from hpr.anatomy.lookup import module_at
from hpr.anatomy.model import Site
from hpr.errors import HprError
from hpr.nn.bank import bank_of, terms_of
from hpr.operators.metric import Measured, measure
from hpr.profiling.profile import Profile
from hpr.runtime.batch import Batch, BatchLike, mask_of
from hpr.runtime.hooks import eval_mode, run, to_device_of


@torch.no_grad()
def expected_gains(
    teacher: nn.Module, student: nn.Module, profile: Profile, kinds: Mapping[str, Sequence[BatchLike]], experts: int = 4
) -> dict[str, float]:
    """Site → what a router that tells kinds of input apart would save there, as a share of the site's damage.

    The damage of a term whose components are weighed by α is quadratic in α, so the best α for each kind, and the best for
    all, come from one small system each; kinds count alike. That is what a router (``hpr.routing.plan.routed``) could bring
    with all factors as they are. For sites of a static student that have one term with a rank. Raises ``HprError`` for fewer
    than two kinds, and for a student that shares nothing.
    """
    if len(kinds) < 2:
        raise HprError(f"{len(kinds)} kinds of input: at least two are needed for a router to tell apart")
    anatomy, bank = describe(teacher), bank_of(student)
    if bank is None:
        raise HprError(f"this {type(student).__name__} shares nothing, so nothing can be routed: share it first")
    profile.check(anatomy)
    measured = measure(teacher, anatomy, profile)
    terms = terms_of(student)
    single = {site: own[0] for site in anatomy.sites if len(own := terms.get(site.name, ())) == 1 and site.kind == "linear"}
    chosen = {site: term for site, term in single.items() if term.v is not None and (term.rank or 0) >= experts}
    moments = [_moments(teacher, list(chosen), batches, measured) for batches in kinds.values()]
    gains = {}
    for site, term in chosen.items():
        assert term.v is not None
        u, v = (bank[name].dense().detach().to(measured[site.name].weight) for name in (term.u, term.v))
        deal = F.one_hot(torch.arange(len(v)) % experts, experts).to(v)
        gains[site.name] = _gain(measured[site.name], u, v, [kind[site.name] for kind in moments], deal)
    return gains


def _gain(one: Measured, u: Tensor, v: Tensor, moments: Sequence[Tensor], deal: Tensor) -> float:
    """What weights by kind save against weights for all, over the damage of the latter."""
    weighted_u, weighted_weight = one.left.times(u), one.left.times(one.weight)
    systems = []
    for moment in moments:
        square = deal.T @ ((u.T @ weighted_u) * (v @ moment @ v.T)) @ deal
        right = deal.T @ ((u.T @ weighted_weight @ moment) * v).sum(1)
        systems.append((square, right, float((weighted_weight * (one.weight @ moment)).sum())))
    common = _least(sum(square for square, *_ in systems), sum(right for _, right, _ in systems))  # type: ignore[arg-type]
    apart = [_least(square, right) for square, right, _ in systems]

    def damage(alphas: Sequence[Tensor]) -> float:
        pairs = zip(alphas, systems, strict=True)
        return sum(whole - 2 * float(alpha @ right) + float(alpha @ square @ alpha) for alpha, (square, right, whole) in pairs)

    together = damage([common] * len(systems))
    return max(0.0, 1 - damage(apart) / together) if together > 0 else 0.0


def _least(square: Tensor, right: Tensor) -> Tensor:
    ridge = 1e-9 * square.diagonal().mean() * torch.eye(len(square)).to(square)
    return torch.linalg.solve(square + ridge, right)


def _moments(
    model: nn.Module, sites: Sequence[Site], batches: Sequence[BatchLike], measured: Mapping[str, Measured]
) -> dict[str, Tensor]:
    """Site → E[x xᵀ] (in, in) of its inputs at positions that count, less the mean that its bias corrects; float64."""
    sums = {site.name: measured[site.name].weight.new_zeros(site.in_features, site.in_features) for site in sites}
    rows = dict.fromkeys(sums, 0)
    current: list[Batch] = []

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            x, mean = args[0].detach(), measured[name].mean
            kept = x[mask_of(current[0], x).bool().to(x.device)].to(sums[name])
            kept = kept if mean is None else kept - mean
            sums[name] += kept.T @ kept
            rows[name] += len(kept)

        return hook

    handles = [module_at(model, site.name).register_forward_pre_hook(note(site.name)) for site in sites]
    try:
        with eval_mode(model):
            for batch in batches:
                current[:] = [to_device_of(batch, model)]
                run(model, current[0])
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / max(rows[name], 1) for name, total in sums.items()}
