"""Round the factors of a shared model: a budget in parameters, and a size of the file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from hpr.coding.codes import Codes, Product, parts_of
from hpr.coding.record import Coded
from hpr.nn.bank import bank_of, terms_of
from hpr.nn.site import SharedSite
from hpr.operators.damping import DERIVED
from hpr.operators.fitting import Fits
from hpr.plans.plan import Plan
from hpr.plans.product import product
from hpr.plans.rounding import Rounding
from hpr.plans.terms import factors_of
from hpr.profiling.profile import Profile
from hpr.rounding.choice import Measure, choose
from hpr.rounding.factors import factor_profile, site_of
from hpr.rounding.model import Rounder
from hpr.rounding.plan import CodedPlan
from hpr.rounding.search import Rounded, coded, round_to
from hpr.rounding.whitening import damage, damped_moments


class FactorRounder(Rounder):
    """A shared model prepared for rounding: what it stores is rounded, factors in the metric of all sites that read them.

    ``profile``: that of the original, aligned as the plan says.
    """

    def __init__(
        self, student: nn.Module, profile: Profile, output_damping: float, input_damping: float, bits: int | None = None
    ):
        dampings = output_damping, input_damping
        super().__init__(student, factor_profile(student, profile, dampings), DERIVED, DERIVED, bits)
        self.dampings = dampings
        self._means = {
            path: (terms, statistics.mean)
            for path, terms in terms_of(student).items()
            if terms and (statistics := profile.sites[path]).mean is not None
        }
        names = {id(parameter): name for name, parameter in student.named_parameters()}
        self._biases: dict[str, tuple[set[str], tuple[int, int]]] = {}  # path → names of biases, and the shape of the weight
        for module in student.modules():
            if isinstance(module, SharedSite) and (bias := getattr(module, "bias", None)) is not None:
                shape = module.out_features, module.in_features
                self._biases.setdefault(module.path, (set(), shape))[0].add(names[id(bias)])

    def rounding(self, step: float) -> Rounding:
        """What a plan says of the codes at a step size."""
        return replace(super().rounding(step), factors=True)

    def _corrected(self, codes: Mapping[str, Codes | Product]) -> dict[str, Tensor]:
        """The same, and biases of shared sites absorb what the rounding of their factors does to the mean output."""
        values, bank = super()._corrected(codes), bank_of(self.model)
        if bank is None:  # the plan keeps everything
            return values
        for path, (terms, mean) in self._means.items():
            if path not in self._biases or mean is None:
                continue
            names, shape = self._biases[path]
            factors = {factor: bank[factor] for factor in factors_of(terms)}
            rounded = {factor: one.dense(codes[site_of(factor)].weight().to(one.weight)) for factor, one in factors.items()}
            before, after = (
                product(terms, {factor: value.detach().to(mean) for factor, value in each.items()}, *shape)  # in float64
                for each in ({factor: one.dense() for factor, one in factors.items()}, rounded)
            )
            change = (before - after) @ mean
            for name in names:
                values[name] = values[name] + change.to(values[name])
        return values


def aligned_profile(fits: Fits, plan: Plan) -> Profile:
    """The profile of the model as the plan aligns it."""
    profile = fits.aligned(plan.alignment).profile
    assert profile is not None
    return profile


def round_shared(
    student: nn.Module, plan: Plan, profile: Profile, limit: int, measure: Measure | None = None, bits: int | None = None
) -> CodedPlan:
    """The plan of a shared model with a rounding added, so that its file takes ``limit`` bytes.

    ``student``: what the plan gives, healed or not. ``profile``: that of the original, aligned as the plan says. ``measure``
    and ``bits`` are as for ``plan_bytes``. Raises ``BudgetError`` for a limit that cannot be met.
    """
    chosen = choose(lambda dampings: FactorRounder(student, profile, *dampings, bits), limit, measure, products=False)
    rounder, rounded = chosen.rounder, chosen.rounded
    made = rounder.student(rounded.codes, rounded.others, rounded.coded)
    coded_diagnostics = {
        "bytes": int(rounded.bytes),
        "bits": stored_bits(plan, rounded.coded or {}),
        "rounding_damage": _damage(rounder, rounded),
    }
    diagnostics = {**plan.diagnostics, **coded_diagnostics}
    described = replace(plan, rounding=rounded.rounding, diagnostics=diagnostics)
    return CodedPlan(described, made, int(rounded.bytes), chosen.tried)


def round_factors(student: nn.Module, plan: Plan, profile: Profile) -> nn.Module:
    """A copy of a shared model, its numbers rounded as the plan says. ``student`` and ``profile`` as for ``round_shared``."""
    how = plan.rounding
    assert how is not None
    rounder = FactorRounder(student, profile, how.output_damping, how.input_damping, how.bits)
    rounded = coded(rounder, round_to(rounder, how.step))
    return rounder.student(rounded.codes, rounded.others, rounded.coded)


def _damage(rounder: Rounder, rounded: Rounded) -> float:
    """Nats per example that rounding costs beside sharing, in the damped metric."""
    total = 0.0
    for whitened in rounder.sites:
        statistics = rounder.profile.sites[whitened.site.name]
        if whitened.read:
            change = rounded.codes[whitened.site.name].weight().to(whitened.weight) - whitened.weight
            left, right = (moment.to(change) for moment in damped_moments(whitened.site.kind, statistics, (0.0, 0.0)))
            total += damage(left, right, statistics.rows, change)
    return total


def stored_bits(plan: Plan, coded: Mapping[str, Coded]) -> dict[str, float]:
    """Site → mean bits of the numbers that are stored for it. Sites that store none are left out."""
    sizes = {
        name: (8 * len(one.stream), sum(part.values.size for part in parts_of(one.codes()))) for name, one in coded.items()
    }
    found = {}
    for name, entry in plan.entries.items():
        parts = [sizes[site_of(factor)] for factor in factors_of(entry.terms)] or ([sizes[name]] if name in sizes else [])
        if numbers := sum(count for _, count in parts):
            found[name] = round(sum(bits for bits, _ in parts) / numbers, 3)
    return found
