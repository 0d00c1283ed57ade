"""Share a model: make a smaller copy whose sites read common factors."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor, nn

from hpr.anatomy.describe import describe
from hpr.anatomy.lookup import module_at, slice_at, weight_at
from hpr.anatomy.model import Anatomy
from hpr.anatomy.swappable import not_swappable
from hpr.errors import HprError
from hpr.nn.bank import bank_of, parameters
from hpr.nn.coded import refuse_coded
from hpr.nn.experts import Terms
from hpr.operators import fitting
from hpr.plans.layer_states import REUSED, paths_of
from hpr.plans.plan import Plan
from hpr.plans.terms import KEEP, FactorShape, Term, factors_of
from hpr.sharing.attach import attach
from hpr.sharing.specification import note_specification

if TYPE_CHECKING:
    from hpr.profiling.profile import Profile


def with_kept(
    model: nn.Module, terms: Mapping[str, tuple[Term, ...]], shapes: Mapping[str, FactorShape]
) -> tuple[Terms, dict[str, FactorShape], dict[str, Tensor]]:
    """The same terms and shapes, completed by experts that are kept beside changed ones, and the values of these."""
    all_terms, all_shapes, values = dict(terms), dict(shapes), {}
    for path in terms:
        found = slice_at(model, path)
        if found is None:
            continue
        beside = path.rpartition(".")[0]
        for number, weight in enumerate(getattr(found.module, found.parameter).detach()):
            other = f"{beside}.{number}"
            if other not in all_terms:
                factor = f"{other}.kept"
                all_terms[other] = (Term(factor),)
                all_shapes[factor] = FactorShape(*weight.shape)
                values[factor] = weight
    return all_terms, all_shapes, values


class Rule(Protocol):
    """Says which layers share without measuring: a preset, or replication rules. Its factors are weights of the model."""

    @property
    def name(self) -> str: ...

    def plan(self, model: nn.Module) -> Plan: ...

    def fit(self, model: nn.Module, anatomy: Anatomy, plan: Plan) -> fitting.Fitted: ...


def check_unshared(model: nn.Module) -> None:
    """Raise ``HprError`` for a model that is shared, coded or quantised already."""
    if bank_of(model) is not None:
        raise HprError(f"this {type(model).__name__} is shared already: plan on its original, or on hpr.unshare of it")
    refuse_coded(model, "shared")
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        raise HprError(f"this {type(model).__name__} is quantised: load it without quantization_config, share, then quantise")


def share(
    model: nn.Module, plan: Plan | Rule, profile: Profile | None = None, *, fits: fitting.Fits | None = None
) -> nn.Module:
    """A copy of ``model`` whose sites read shared factors as the plan says; the model itself is untouched.

    Sites that are kept stay as they are: the identity plan gives a plain copy. Training mode, device and dtype are those
    of the model. With a rule (``hpr.presets``, for training from scratch) nothing is fitted: each factor starts as the
    weight of its group's first layer. ``fits``: the fits of this model, to measure it once for several plans; they bring the
    profile. Raises ``HprError`` where the plan does not fit, the model is already shared or
    quantised, a rule comes with a profile, or a fitted factor is missing, of another shape or not finite.
    """
    check_unshared(model)
    rule = None if isinstance(plan, Plan) else plan
    if rule is not None and profile is not None:
        raise HprError(f"{rule} takes no profile, since it fits nothing: leave it out, or share {rule.name}'s plan(model)")
    plan = plan if isinstance(plan, Plan) else plan.plan(model)
    if fits is not None:
        fits.check(model, profile)
    anatomy = describe(model) if fits is None else fits.anatomy
    plan.validate(anatomy)
    changed = {name: entry.terms for name, entry in plan.entries.items() if entry.terms}
    if not changed and not plan.layers:
        return copy.deepcopy(model)
    if rule is None:
        aligned = (fits or fitting.Fits(model, profile)).aligned(plan.alignment)
        fitted = aligned.fit(plan)
        student = aligned.model if fits is None and plan.alignment else copy.deepcopy(aligned.model)
    else:
        fitted = rule.fit(model, anatomy, plan)
        student = copy.deepcopy(model)
    _check_finite(changed, fitted)
    terms, shapes, kept = with_kept(student, changed, plan.factors(anatomy))
    terms |= dict.fromkeys(removed_paths(plan), ())
    if not terms:
        path, shapes, kept = _placeholder(student, anatomy, plan)
        terms = {path: tuple(Term(factor) for factor in shapes)}
    aliases = {name: anatomy[name].aliases for name in changed}
    bank = attach(student, terms, shapes, aliases, layers=paths_of(anatomy, plan.layers))
    bank.load({**fitted.factors, **kept})
    used = profile if fits is None else fits.profile
    bank.objective = None if used is None else used.about.get("objective")
    for name, change in fitted.bias_changes.items():
        if anatomy[name].has_bias:
            bias: Tensor = module_at(student, name).bias  # type: ignore[assignment]
            bias.data += change.to(bias)
    note_specification(student)
    if plan.layers and (count := parameters(student)) != plan.parameters(anatomy):
        raise HprError(
            f"the plan counts {plan.parameters(anatomy):,} parameters, the model made from it has {count:,}: what it says of "
            f"removed parameters is not so; take it from hpr.layer_reuse.dead_weights"
        )
    return student


def _placeholder(model: nn.Module, anatomy: Anatomy, plan: Plan) -> tuple[str, dict[str, FactorShape], dict[str, Tensor]]:
    """A kept site that the bank holds unchanged: its placeholder makes loading without hpr fail if nothing else would."""
    fixed = not_swappable(model, anatomy)
    for site in anatomy.sites:
        kept = plan.entries[site.name].operator == KEEP and site.name not in fixed
        if kept and site.kind == "linear" and site.expert is None:
            factor = f"{site.name}.kept"
            shape = FactorShape(site.out_features, site.in_features)
            return site.name, {factor: shape}, {factor: weight_at(model, site).detach()}
    raise HprError("no Linear weight is kept, so loading could not tell which layers are dropped: drop fewer layers")


def _check_finite(changed: Mapping[str, Sequence[Term]], fitted: fitting.Fitted) -> None:
    for name, terms in changed.items():
        parts = {factor: fitted.factors.get(factor) for factor in factors_of(terms)}
        for part, values in {**parts, "bias change": fitted.bias_changes.get(name)}.items():
            if values is not None and not torch.isfinite(values).all():
                raise HprError(f"{name}: its {part} is not finite: check the calibration data, or keep this site")


def removed_paths(plan: Plan) -> list[str]:
    """Paths of the modules without effect inside a block that stays: sites, and other modules that a plan calls removed."""
    sites = [name for name, entry in plan.entries.items() if entry.operator == REUSED and not entry.terms]
    return sites + [path for path in plan.removed if path not in plan.entries and path not in plan.layers]
