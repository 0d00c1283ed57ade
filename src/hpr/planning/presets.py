"""Groupings of layers from the literature, for training from scratch: ``hpr.share(model, hpr.presets.cycle(groups=3))``.

A preset says which layers of a stack read the same weights, by rule instead of by measurement. Biases, norms and embeddings
stay private to their layers. A pretrained model is better served by ``hpr.plan``, which measures what sharing costs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor, nn

from hpr.anatomy.describe import describe
from hpr.anatomy.lookup import weight_at
from hpr.anatomy.model import Anatomy, Site, Stack
from hpr.anatomy.swappable import not_swappable
from hpr.errors import PlanError
from hpr.operators import tie
from hpr.operators.fitting import Fitted
from hpr.planning.rows import rows
from hpr.plans.budget import Budget
from hpr.plans.plan import Plan, keep_all
from hpr.plans.terms import KEEP, Entry, factors_of


@dataclass(frozen=True)
class Preset:
    """A rule that puts every layer of a stack into a group; the functions of this module make one.

    ``number`` is that of the groups, or for ``adjacent`` that of the layers in each. ``only`` is a shell pattern of site names
    (``encoder.*``, several separated by commas); all other sites stay as they are. ``spanning``: the layers of an encoder and,
    after them, those of its decoder are one sequence (Tied Transformers, Xia et al. 2019). Self-attention and feed-forward,
    which both stacks have, are then shared between them. Raises ``PlanError`` if the name is unknown, or if the number is no
    whole number or is below the least number that the rule accepts.
    """

    name: str
    number: int
    only: str | None = None
    spanning: bool = False

    def __post_init__(self) -> None:
        if self.name not in _RULES:
            raise PlanError(f"no preset {self.name!r}; there are {', '.join(_RULES)}: use one of these")
        least = _LEAST.get(self.name, 1)
        if type(self.number) is not int or self.number < least:
            raise PlanError(f"{self}: {self.number!r} is not a whole number from {least} up: give {least} or more")

    def __str__(self) -> str:
        more = ", spanning=True" if self.spanning else ""
        return f"{self.name}({'size' if self.name == 'adjacent' else 'groups'}={self.number!r}{more})"

    def assign(self, layers: int) -> tuple[int, ...]:
        """Group number of every layer of a stack, in layer order: (layers,).

        Groups are numbered from 0 in order of their first layer, so layer 0 is in group 0 and no number is left out. Raises
        ``PlanError`` if the number of layers is no whole number from 1 up, or is too small for the rule.
        """
        if type(layers) is not int or layers < 1:
            raise PlanError(f"{self}: {layers!r} is not a number of layers: give a whole number from 1 up")
        if self.number > layers:
            raise PlanError(f"{self} needs {self.number} layers or more, the stack has {layers}: give {layers} or less")
        return _RULES[self.name](layers, self.number)

    def plan(self, model: nn.Module) -> Plan:
        """A validated plan that ties the sites of one slot in one group, and keeps all other sites.

        The plan keeps embeddings, sites outside the stacks or outside ``only``, sites that cannot be shared, and sites that
        are alone in their group. It ties an expert to the experts of the same number in other layers. If a slot has several
        shapes, each shape has separate groups. The budget is the number of parameters that the plan needs. Raises
        ``PlanError`` if there is nothing to share, or if a stack has fewer layers than the preset needs.
        """
        anatomy = describe(model)
        free = self._free(model, anatomy)
        groups = self._spanning(model, anatomy, free) if self.spanning else self._by_stack(anatomy, free)
        entries = {site.name: Entry(KEEP) for site in anatomy.sites}
        for members in groups:
            if len(members) > 1:
                entries |= {name: Entry(tie.TIE, terms) for name, terms in tie.terms(members, ()).items()}
        tied = replace(keep_all(anatomy), entries=entries, diagnostics={"label": str(self)})
        plan = replace(tied, budget=Budget(str(self), tied.parameters(anatomy)))
        plan.validate(anatomy)
        return plan

    def fit(self, model: nn.Module, anatomy: Anatomy, plan: Plan) -> Fitted:
        """Factor name → the weight of its group's lowest layer, (out, in); no bias changes.

        The mean of the group would be a bad start for training. The mean of N independent draws of standard deviation σ has
        the standard deviation σ/√N, which is not the one that the model's initialisation chose.
        """
        factors: dict[str, Tensor] = {}
        for site in sorted(anatomy.sites, key=lambda site: site.layer or 0):
            for factor in factors_of(plan.entries[site.name].terms):
                factors.setdefault(factor, weight_at(model, site).detach())
        return Fitted(factors, {})

    def _free(self, model: nn.Module, anatomy: Anatomy) -> set[Site]:
        """Sites that may be tied. Raises ``PlanError`` if there are none."""
        deep = {stack.name for stack in anatomy.stacks if stack.layers > 1}
        if not deep:
            stacks = ", ".join(f"{stack.name} with {stack.layers}" for stack in anatomy.stacks) or "none"
            raise PlanError(
                f"{self} needs a stack of 2 layers or more to share between, {anatomy.model_class} has {stacks}: "
                f"build the model with more layers"
            )
        inside = [site for site in anatomy.select(self.only) if site.stack is not None and site.kind == "linear"]
        bound = not_swappable(model, anatomy)
        free = {site for site in inside if site.name not in bound}
        if not free:
            why = next((bound[site.name] for site in inside), "those are embeddings or outside the stacks")
            raise PlanError(
                f"{self} with only={self.only!r} finds no site that layers could share ({why}): name other sites with only="
            )
        return free

    def _by_stack(self, anatomy: Anatomy, free: set[Site]) -> list[list[Site]]:
        """The groups of every slot; each stack has separate groups."""
        used = {site.stack for site in free}
        group_of = {stack.name: self._assigned(stack) for stack in anatomy.stacks if stack.name in used}
        all_groups: list[list[Site]] = []
        for sites in anatomy.slots().values():
            groups: dict[tuple[int, int | None], list[Site]] = {}
            for site in sites:
                if site in free and site.stack is not None and site.layer is not None:
                    groups.setdefault((group_of[site.stack][site.layer], site.expert), []).append(site)
            all_groups += groups.values()
        return all_groups

    def _spanning(self, model: nn.Module, anatomy: Anatomy, free: set[Site]) -> list[list[Site]]:
        """The groups of every row of counterparts. Raises ``PlanError`` if the model is no encoder–decoder."""
        all_rows = [row for row in rows(model, anatomy, {site.name for site in free}) if row.sites[0].expert is None]
        if not any(len(row.spans) > 1 for row in all_rows):
            raise PlanError(f"{self} needs an encoder and a decoder with slots in common: leave spanning out")
        all_groups: list[list[Site]] = []
        for row in all_rows:
            groups: dict[int, list[Site]] = {}
            rule = replace(self, number=min(self.number, len(row.sites)))
            for site, group in zip(row.sites, rule.assign(len(row.sites)), strict=True):
                groups.setdefault(group, []).append(site)
            all_groups += groups.values()
        return all_groups

    def _assigned(self, stack: Stack) -> tuple[int, ...]:
        try:
            return self.assign(stack.layers)
        except PlanError as error:
            raise PlanError(f"{stack.name}: {error}, or leave this stack out with only=") from error


def sequence(groups: int, only: str | None = None, spanning: bool = False) -> Preset:
    """Puts consecutive layers into equal groups; 6 layers in 3 groups are 0 0 1 1 2 2 (SEQUENCE of Takase & Kiyono 2021).

    If the layers do not divide evenly, sizes differ by one at most; 7 layers in 3 groups are 0 0 0 1 1 2 2.
    """
    return Preset("sequence", groups, only, spanning)


def cycle(groups: int, only: str | None = None, spanning: bool = False) -> Preset:
    """Repeats the groups in order; 6 layers in 3 groups are 0 1 2 0 1 2 (CYCLE of Takase & Kiyono 2021).

    If the layers do not divide evenly, the last repetition is cut short; 7 layers in 3 groups are 0 1 2 0 1 2 0.
    """
    return Preset("cycle", groups, only, spanning)


def cycle_rev(groups: int, only: str | None = None, spanning: bool = False) -> Preset:
    """``cycle`` with its last repetition reversed; 6 layers in 3 groups are 0 1 2 2 1 0 (CYCLE (REV) of Takase & Kiyono 2021).

    If the layers do not divide evenly, the last repetition is reversed and then cut short; 7 layers in 3 groups are
    0 1 2 0 1 2 2. The first repetition is never reversed, so as many groups as layers share nothing.
    """
    return Preset("cycle_rev", groups, only, spanning)


def sandwich(groups: int = 3, only: str | None = None) -> Preset:
    """Shares all layers but the first and the last; 6 layers are 0 1 1 1 1 2 (Subformer, Reid et al. 2021).

    With more than three groups, the layers in the middle are a ``sequence`` of all groups but two; 6 layers in 4 groups are
    0 1 1 2 2 3. Raises ``PlanError`` for fewer than three groups.
    """
    return Preset("sandwich", groups, only)


def albert(only: str | None = None, spanning: bool = False) -> Preset:
    """Puts all layers into one group (ALBERT, Lan et al. 2020). ALBERT also shares biases and norms; here they stay private."""
    return Preset("albert", 1, only, spanning)


def adjacent(size: int = 2, only: str | None = None) -> Preset:
    """Shares between ``size`` neighbours; 6 layers by 2 are 0 0 1 1 2 2 (block-wise sharing, MobileLLM, Liu et al. 2024).

    If the layers do not divide evenly, the last group is smaller; 7 layers by 2 are 0 0 1 1 2 2 3. The number of groups
    follows from the number of layers; ``sequence`` fixes the number of groups instead.
    """
    return Preset("adjacent", size, only)


def _sequence(layers: int, groups: int) -> tuple[int, ...]:
    return tuple(layer * groups // layers for layer in range(layers))


def _cycle(layers: int, groups: int) -> tuple[int, ...]:
    return tuple(layer % groups for layer in range(layers))


def _cycle_rev(layers: int, groups: int) -> tuple[int, ...]:
    last = (layers - 1) // groups * groups  # where the last repetition starts
    forward = _cycle(layers, groups)
    return forward if last == 0 else forward[:last] + tuple(groups - 1 - group for group in forward[last:])


def _sandwich(layers: int, groups: int) -> tuple[int, ...]:
    return (0, *(1 + group for group in _sequence(layers - 2, groups - 2)), groups - 1)


def _adjacent(layers: int, size: int) -> tuple[int, ...]:
    return tuple(layer // size for layer in range(layers))


_RULES: dict[str, Callable[[int, int], tuple[int, ...]]] = {
    "sequence": _sequence,
    "cycle": _cycle,
    "cycle_rev": _cycle_rev,
    "sandwich": _sandwich,
    "albert": _sequence,
    "adjacent": _adjacent,
}
_LEAST = {"sandwich": 3}
