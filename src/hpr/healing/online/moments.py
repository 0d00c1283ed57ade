"""Learning without gradients: second moments that forget, and factors fitted anew to them in closed form."""

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
    """The profile of an original on a stream: each batch takes the share ``forget`` of what was known before it.

    ``plan`` is that of the student, ``profile`` where to begin (the one that it was planned with). ``fitted`` gives the student
    that the plan gives on the moments as they are now. Raises ``HprError`` for a share that is not above 0 and at most 1, and
    for a profile of another model.
    """

    def __init__(self, teacher: nn.Module, plan: Plan, profile: Profile, forget: float = 0.02):
        if not 0 < forget <= 1:
            raise HprError(f"forget {forget} must be above 0 and at most 1: it is the share that one batch takes")
        self.anatomy = describe(teacher)
        profile.check(self.anatomy)
        plan.validate(self.anatomy)
        self.teacher, self.plan, self.profile, self.forget = teacher, plan, profile, forget
        about = profile.about
        self.goal = replace(objective_for(teacher, about.get("objective")), temperature=about.get("temperature", 1.0))

    def add(self, batches: Sequence[Batch], seed: int = 0) -> None:
        """Measure some batches on the original, and let them count; the labels of curvature are drawn by the seed."""
        given = [to_device_of(batch, self.teacher) for batch in batches]
        found, _ = measure_curvature(self.teacher, self.anatomy, given, self.goal, seed)
        part = 1 - (1 - self.forget) ** len(given)
        sites = {name: blended(known, found[name], part) for name, known in self.profile.sites.items()}
        self.profile = replace(self.profile, sites=sites)

    def fitted(self) -> nn.Module:
        """A student of the same plan, its factors fitted in closed form to the moments as they are now."""
        return share(self.teacher, self.plan, self.profile)

    def tensors(self) -> dict[str, Tensor]:
        """All that is known, by site and part."""
        found: dict[str, Tensor] = {}
        for name, site in self.profile.sites.items():
            found[f"{name}.rows"] = torch.tensor(site.rows, dtype=torch.float64)
            found |= {f"{name}.{part}": value for part in _PARTS if (value := getattr(site, part)) is not None}
        return found

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """The inverse of ``tensors``, in place."""
        sites = {}
        for name in self.profile.sites:
            parts = {part: tensors[key] for part in _PARTS if (key := f"{name}.{part}") in tensors}
            sites[name] = SiteStatistics(rows=float(tensors[f"{name}.rows"]), **parts)
        self.profile = replace(self.profile, sites=sites)


def blended(known: SiteStatistics, new: SiteStatistics, part: float) -> SiteStatistics:
    """Moments of which ``part`` is new; where a site was not seen, what was known stays.

    Each side is the mean of both, weighed by what they are worth together (rows · tr left · tr right), which itself is mixed,
    so that sites keep their weights against each other. What lies between two means of inputs is left out of centred moments.
    """
    if not new.live or not known.live:
        return new if new.live else known
    weights, both = (1 - part, part), (known, new)
    rows = sum(weight * one.rows for weight, one in zip(weights, both, strict=True))
    masses = [weight * one.mass for weight, one in zip(weights, both, strict=True)]
    left, right = pooled(both, masses)
    right_trace = sum(weight * one.rows * trace(one.right) for weight, one in zip(weights, both, strict=True)) / rows
    mean = None
    if known.mean is not None and new.mean is not None:
        mean = (weights[0] * known.rows * known.mean + weights[1] * new.rows * new.mean) / rows
    return SiteStatistics(left * (sum(masses) / (rows * right_trace)), right * right_trace, rows, mean)
