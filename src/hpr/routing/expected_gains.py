"""Predict what a router would gain, from several kinds of input, before it is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpr.anatomy.lookup import module_at
from hpr.anatomy.model import Site
from hpr.errors import HprError
from hpr.nn.bank import bank_of, terms_of
from hpr.operators import damping
from hpr.operators.fitting import Fits
from hpr.operators.metric import Measured
from hpr.profiling.layout import turned_modules
from hpr.profiling.profile import Profile
from hpr.runtime.batch import Batch, BatchLike, mask_of
from hpr.runtime.hooks import eval_mode, run, to_device_of


@torch.no_grad()
def expected_gains(
    teacher: nn.Module, student: nn.Module, profile: Profile, kinds: Mapping[str, Sequence[BatchLike]], experts: int = 4
) -> dict[str, float]:
    """Site → the share of the site's damage that a router would save there, from 0 to 1.

    ``kinds``: batches by kind of input; every kind has the same weight. The router would multiply the components of a term by
    α. The damage is quadratic in α, so a small linear system gives the best α for each kind, and another the best α for all
    kinds together. The function compares their damages, with all factors unchanged. It covers the Linear sites of a static
    student that have exactly one term, with a rank of at least ``experts``. ``hpr.routing.plan.routed`` adds the router. Raises
    ``HprError`` for fewer than two kinds, and for a student that shares nothing.
    """
    if len(kinds) < 2:
        raise HprError(f"there are {len(kinds)} kinds of input, a router distinguishes at least two: give more kinds")
    bank = bank_of(student)
    if bank is None:
        raise HprError(f"this {type(student).__name__} shares nothing, so it has no term to route: share it first")
    fits, terms = Fits(teacher, profile), terms_of(student)
    linear = [site for site in fits.anatomy.sites if site.kind == "linear"]
    single = {site: terms[site.name][0] for site in linear if len(terms.get(site.name, ())) == 1}
    factors = {site: (term.u, term.v) for site, term in single.items() if term.v and (term.rank or 0) >= experts}
    measured = fits.measured(site.name for site in factors)
    moments = [_moments(teacher, list(factors), batches, measured) for batches in kinds.values()]
    gains = {}
    for site, names in factors.items():
        u, v = (bank[name].dense().detach().to(measured[site.name].weight) for name in names)
        deal = F.one_hot(torch.arange(len(v)) % experts, experts).to(v)
        gains[site.name] = _gain(measured[site.name], u, v, [kind[site.name] for kind in moments], deal)
    return gains


def _gain(site: Measured, u: Tensor, v: Tensor, moments: Sequence[Tensor], deal: Tensor) -> float:
    """The damage that one α per kind saves against a common α, as a share of the damage with the common α.

    ``u`` (out, rank) and ``v`` (rank, in) are the factors. ``moments``: E[x xᵀ] (in, in) of each kind. ``deal`` (rank, experts)
    is 1 if the component belongs to the expert, and 0 otherwise.
    """
    weighted_u, weighted_weight = site.left.times(u), site.left.times(site.weight)
    systems = []
    for moment in moments:
        square = deal.T @ ((u.T @ weighted_u) * (v @ moment @ v.T)) @ deal
        right = deal.T @ ((u.T @ weighted_weight @ moment) * v).sum(1)
        systems.append((square, right, float((weighted_weight * (site.weight @ moment)).sum())))
    common = _least(sum(square for square, *_ in systems), sum(right for _, right, _ in systems))  # type: ignore[arg-type]
    apart = [_least(square, right) for square, right, _ in systems]

    def damage(alphas: Sequence[Tensor]) -> float:
        pairs = zip(alphas, systems, strict=True)
        return sum(whole - 2 * float(alpha @ right) + float(alpha @ square @ alpha) for alpha, (square, right, whole) in pairs)

    together = damage([common] * len(systems))
    return max(0.0, 1 - damage(apart) / together) if together > 0 else 0.0


def _least(square: Tensor, right: Tensor) -> Tensor:
    """The α (experts,) with the least damage: the solution of ``square`` α = ``right``, with a small ridge."""
    return damping.solve(damping.damped(square, damping.DERIVED), right[:, None])[:, 0]


def _moments(
    model: nn.Module, sites: Sequence[Site], batches: Sequence[BatchLike], measured: Mapping[str, Measured]
) -> dict[str, Tensor]:
    """Site → E[x xᵀ] (in, in) of its inputs in float64, without padding. x is centred if the site's bias absorbs the mean."""
    sums = {site.name: measured[site.name].weight.new_zeros(site.in_features, site.in_features) for site in sites}
    rows = dict.fromkeys(sums, 0)
    current: list[Batch] = []
    moved = [to_device_of(batch, model) for batch in batches]
    turned = turned_modules(model, moved)

    def note(name: str) -> Any:
        def hook(module: nn.Module, args: Any) -> None:
            x, mean = args[0].detach(), measured[name].mean
            inputs = x[mask_of(current[0], x, module in turned).bool().to(x.device)].to(sums[name])
            inputs = inputs if mean is None else inputs - mean
            sums[name] += inputs.T @ inputs
            rows[name] += len(inputs)

        return hook

    handles = [module_at(model, site.name).register_forward_pre_hook(note(site.name)) for site in sites]
    try:
        with eval_mode(model):
            for batch in moved:
                current[:] = [batch]
                run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: total / max(rows[name], 1) for name, total in sums.items()}
