"""Learning without gradients: second moments that forget, and factors fitted to them in closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from hpr.anatomy.describe import describe
from hpr.errors import HprError
from hpr.plans.plan import Plan
from hpr.profiling.curvature import measure_curvature
from hpr.profiling.objectives import objective_for
from hpr.profiling.profile import Profile, SiteStatistics, pooled, trace
from hpr.runtime.batch import Batch
from hpr.runtime.hooks import to_device_of
from hpr.sharing.share import share

_PARTS = ("left", "right", "mean")


class Moments:
    """The profile of an original on a stream. Each new batch replaces the fraction ``forget`` of the statistics so far.

    ``plan``: that of the student. ``profile``: the statistics to begin with, which the student was planned with. ``fitted``
    returns the student that the plan gives on the present statistics. Raises ``HprError`` for a fraction that is not above 0
    and at most 1, and for a profile or plan of another model.

    >>> moments = Moments(teacher, plan, profile, forget=0.05)
    >>> healer = OnlineHealer(student, validation, teacher, moments=moments)
    """

    def __init__(self, teacher: nn.Module, plan: Plan, profile: Profile, forget: float = 0.02):
        if not 0 < forget <= 1:
            raise HprError(f"forget {forget} must be above 0 and at most 1: it is the fraction that one batch replaces")
        self.anatomy = describe(teacher)
        profile.check(self.anatomy)
        plan.validate(self.anatomy)
        self.teacher, self.plan, self.profile, self.forget = teacher, plan, profile, forget
        about = profile.about
        self.goal = replace(objective_for(teacher, about.get("objective")), temperature=about.get("temperature", 1.0))

    def add(self, batches: Sequence[Batch], seed: int = 0) -> None:
        """Measure some batches on the original, and add their statistics. The seed draws the labels for the curvature."""
        moved = [to_device_of(batch, self.teacher) for batch in batches]
        new, _ = measure_curvature(self.teacher, self.anatomy, moved, self.goal, seed)
        part = 1 - (1 - self.forget) ** len(moved)
        sites = {name: blended(known, new[name], part) for name, known in self.profile.sites.items()}
        self.profile = replace(self.profile, sites=sites)

    def fitted(self) -> nn.Module:
        """Return a student of the same plan, with factors fitted in closed form to the present statistics."""
        return share(self.teacher, self.plan, self.profile)

    def tensors(self) -> dict[str, Tensor]:
        """Return all statistics, by site and part."""
        found: dict[str, Tensor] = {}
        for name, site in self.profile.sites.items():
            found[f"{name}.rows"] = torch.tensor(site.rows, dtype=torch.float64)
            found |= {f"{name}.{part}": value for part in _PARTS if (value := getattr(site, part)) is not None}
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Replace the statistics by those that ``tensors`` returned."""
        sites = {}
        for name in self.profile.sites:
            parts = {part: tensors[key] for part in _PARTS if (key := f"{name}.{part}") in tensors}
            sites[name] = SiteStatistics(rows=float(tensors[f"{name}.rows"]), **parts)
        self.profile = replace(self.profile, sites=sites)


def blended(known: SiteStatistics, new: SiteStatistics, part: float) -> SiteStatistics:
    """Return statistics of which the fraction ``part`` is new. A site that the new batches did not reach keeps its own.

    Each side is the mean of both, weighted by their Fisher traces (rows · tr left · tr right). The traces are mixed
    too, so sites keep their weights relative to each other. Centred moments leave out the distance between the two means of
    inputs.
    """
    if not new.has_gradient or not known.has_gradient:
        return new if new.has_gradient else known
    weights, both = (1 - part, part), (known, new)
    rows = sum(weight * one.rows for weight, one in zip(weights, both, strict=True))
    traces = [weight * one.fisher_trace for weight, one in zip(weights, both, strict=True)]
    left, right = pooled(both, traces)
    right_trace = sum(weight * one.rows * trace(one.right) for weight, one in zip(weights, both, strict=True)) / rows
    mean = None
    if known.mean is not None and new.mean is not None:
        mean = (weights[0] * known.rows * known.mean + weights[1] * new.rows * new.mean) / rows
    return SiteStatistics(left * (sum(traces) / (rows * right_trace)), right * right_trace, rows, mean)
