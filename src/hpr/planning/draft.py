"""A draft: all candidates of a model, measured, that answers for any budget with plans.

The solver is pure; here its choices become entries of a ``Plan``, and a draft is narrowed to some sites or to what is left once
layers reuse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hpr.anatomy.model import Anatomy, Site
from hpr.anatomy.symmetry import AlignTarget, Symmetry
from hpr.errors import HprError
from hpr.operators.alignment import symmetry_groups
from hpr.operators.registry import OPERATORS, plannable
from hpr.plans.budget import Budget, parse_budget
from hpr.plans.plan import Plan
from hpr.plans.terms import KEEP, Entry
from hpr.solver import lagrangian
from hpr.solver.candidates import Candidate, Choice, Solution, Track
from hpr.solver.composite import restrict

if TYPE_CHECKING:
    from hpr.layer_reuse.reuse import Reuse


@dataclass(frozen=True)
class Draft:
    """All candidates of a model, measured: ``tracks`` for the solver, ``fixed`` sites that stay as they are.

    ``aligned``: the candidates of the same model, aligned as ``alignment`` says, where that may pay. Plans are made of either.
    """

    anatomy: Anatomy
    tracks: tuple[Track, ...]
    fixed: tuple[Site, ...]
    bytes_per_parameter: float
    only: str | None = None
    alignment: tuple[AlignTarget, ...] = ()
    aligned: Draft | None = None
    reuse: Reuse | None = None

    def reusing(self, reuse: Reuse) -> Draft:
        """The same candidates for what is left once some layers are dropped or reuse what others compute."""
        gone = set(reuse.dead_weights.rows)
        chosen = {site.name for site in self.anatomy.sites} - gone
        tracks = tuple(found for track in self.tracks if (found := _narrowed(track, chosen)) is not None)
        planned = {name for track in tracks for name in _sites(track)}
        fixed = tuple(site for site in self.anatomy.sites if site.name not in planned | gone)
        aligned = self.aligned and self.aligned.reusing(reuse)
        return replace(self, tracks=tracks, fixed=fixed, aligned=aligned, reuse=reuse)

    def narrowed(self, only: str) -> Draft:
        """The same candidates for some sites alone; all others stay as they are."""
        chosen = {site.name for site in self.anatomy.select(only)}
        tracks = tuple(found for track in self.tracks if (found := _narrowed(track, chosen)) is not None)
        planned = {name for track in tracks for name in _sites(track)}
        fixed = tuple(site for site in self.anatomy.sites if site.name not in planned)
        aligned = self.aligned and self.aligned.narrowed(only)
        return replace(self, tracks=tracks, fixed=fixed, only=only, aligned=aligned, reuse=None)

    def limit(self, budget: Budget) -> int:
        """Parameters left for the sites on the tracks. Raises ``HprError`` where nothing is left, naming the least budget."""
        limit = budget.parameters - self.untouched
        if limit < 1:
            raise HprError(f"a budget of {budget.text} is {budget.parameters:,} parameters, but {self._least()}")
        return limit

    @property
    def untouched(self) -> int:
        """Parameters that no plan changes: biases, norms, sites without gradient and sites outside ``only``."""
        kept = self.anatomy.other_parameters + sum(site.parameters for site in self.fixed)
        if self.reuse is None:
            return kept
        vanished = sum(self.anatomy[name].parameters for name in self.reuse.dead_weights.rows)
        return kept + vanished - self.reuse.parameters(self.anatomy)

    def budget(self, text: str) -> Budget:
        """A budget as text (50%, 11M, 45MB) for this model."""
        return parse_budget(text, self.anatomy, self.bytes_per_parameter, self.only)

    def best(self, budget: Budget) -> Plan:
        """The plan of least predicted damage, of all searches: all operators together and each one alone."""
        return min((one._best(budget) for one in self._either), key=lambda plan: plan.damage)

    @property
    def plain(self) -> Draft:
        """The same without alignment."""
        return replace(self, aligned=None)

    @property
    def _either(self) -> tuple[Draft, ...]:
        return (self,) if self.aligned is None else (self, self.aligned)

    def _best(self, budget: Budget) -> Plan:
        return self.plan(self._guarded(lagrangian.plan_candidates, budget)[0], budget)

    def alternatives(self, budget: Budget, count: int) -> list[Plan]:
        """Up to ``count`` plans worth measuring, unlike each other, the best by its own measure first.

        In turn: the best plan, the best without each operator that it uses (an operator whose damage is predicted too low
        shows up there), then the best structures of the K-best search. Where aligning may pay, the last one is the best
        plan of the worse of the two, aligned or not.
        """
        if self.aligned is None:
            return self._alternatives(budget, count)
        better, worse = sorted(self._either, key=lambda one: one._best(budget).damage)
        return [*better._alternatives(budget, max(1, count - 1)), *([worse._best(budget)] if count > 1 else [])]

    def _alternatives(self, budget: Budget, count: int) -> list[Plan]:
        found = [self._guarded(lagrangian.plan_candidates, budget)[0]]
        used = {choice.candidate.operator for choice in found[0].choices if choice.candidate.rows is None} - {KEEP}
        if len(used) > 1:
            for operator in sorted(used):
                with suppress(HprError):  # the budget cannot be met without it
                    found.append(self._without(operator, budget))
        found += self._guarded(lagrangian.k_best, budget, count)
        unique: dict[Any, Solution] = {}
        for solution in found:
            unique.setdefault(solution.structure, solution)
        return [self.plan(solution, budget) for solution in list(unique.values())[:count]]

    def without(self, operator: str, budget: Budget) -> Plan:
        """The best plan that does not use one operator. Raises ``HprError`` where there is none."""
        return min((one.plan(one._without(operator, budget), budget) for one in self._either), key=lambda plan: plan.damage)

    def _without(self, operator: str, budget: Budget) -> Solution:
        others = set(plannable()) - {operator}
        best = lagrangian.plan_candidates(restrict(self.tracks, others), self.limit(budget))[0]
        return replace(best, label=f"without {operator}")

    def plan(self, solution: Solution, budget: Budget) -> Plan:
        """Write a solution down, one entry per site in model order."""
        entries = {site.name: Entry(KEEP) for site in self.fixed}
        for choice in solution.choices:
            if choice.candidate.rows is None:
                entries |= _entries(choice, self.anatomy)
        entries |= _entries_by_rows(solution.choices, self.anatomy)
        entries |= {name: Entry(KEEP) for name in (self.reuse.dead_weights.rows if self.reuse else ())}  # give way below
        diagnostics = {"label": solution.label, "solver": _account(solution)}
        plan = Plan(
            model_class=self.anatomy.model_class,
            fingerprint=self.anatomy.fingerprint,
            budget=budget,
            dense_parameters=self.anatomy.total_parameters,
            other_parameters=self.anatomy.other_parameters,
            entries={site.name: entries[site.name] for site in self.anatomy.sites},
            diagnostics=diagnostics,
            stacks=self.anatomy.stacks,
        )
        plan = replace(plan, alignment=_used(self.alignment, plan, self.anatomy))
        return plan if self.reuse is None else _with_reuse(plan, self.anatomy, self.reuse)

    def _guarded(self, search: Callable[..., list[Solution]], budget: Budget, *more: int) -> list[Solution]:
        limit = self.limit(budget)
        if limit < sum(lagrangian.smallest(track) for track in self.tracks):
            raise HprError(f"a budget of {budget.text} is {budget.parameters:,} parameters, but {self._least()}")
        return search(self.tracks, limit, *more)

    def _least(self) -> str:
        smallest = self.untouched + sum(lagrangian.smallest(track) for track in self.tracks)
        share = 100 * smallest / self.anatomy.total_parameters
        return (
            f"the smallest plan of this model needs {smallest:,} ({share:.1f}% of all): "
            f"{self.untouched:,} of them are biases, norms and sites that are not to be changed. Raise the budget"
        )


def _with_reuse(plan: Plan, anatomy: Anatomy, reuse: Reuse) -> Plan:
    """The plan with states of layers, their damage spread over the sites that vanish."""
    from hpr.layer_reuse.reuse import with_layers  # an optional feature: other plans never load it

    plan = with_layers(plan, anatomy, reuse.states, reuse.dead_weights)
    share = reuse.damage / len(reuse.dead_weights.rows)
    spread = {name: replace(plan.entries[name], damage=share) for name in reuse.dead_weights.rows}
    named = ", ".join(f"{layer} {state}" for layer, state in reuse.states.items())
    label = f"{plan.diagnostics['label']}, {named}"
    return replace(plan, entries={**plan.entries, **spread}, diagnostics={**plan.diagnostics, "label": label})


def _used(targets: Sequence[AlignTarget], plan: Plan, anatomy: Anatomy) -> tuple[AlignTarget, ...]:
    """Those that serve a group of the plan: of an attention or feed-forward that shares anything all, else none."""
    sharing = [anatomy[name] for names in plan.groups() for name in names]
    used: set[Symmetry] = set()
    for group in symmetry_groups([target.symmetry for target in targets]):
        if any(
            target.touches(site) for target in targets if target.symmetry in group for site in sharing if site.expert is None
        ):
            used |= set(group)
    return tuple(target for target in targets if target.symmetry in used)


def _narrowed(track: Track, chosen: set[str]) -> Track | None:
    """The positions of a track whose sites are chosen, with the candidates of those alone; None where there are none."""
    labels = {index: _labelled(track.candidates[index, index + 1]) for index in range(track.length)}
    kept = [index for index in range(track.length) if labels[index] <= chosen]
    candidates = {
        (kept.index(start), kept.index(stop - 1) + 1): several
        for (start, stop), several in track.candidates.items()
        if all(index in kept for index in range(start, stop))
    }
    stays = [name for name in track.name.split(" + ") if any(_in_stack(site, name) for index in kept for site in labels[index])]
    return Track(" + ".join(stays) or track.name, len(kept), candidates) if kept else None


def _in_stack(site: str, name: str) -> bool:
    return " · " in name and site.startswith(f"{name.partition(' · ')[0]}.")


def _sites(track: Track) -> set[str]:
    return {site for several in track.candidates.values() for site in _labelled(several)}


def _labelled(candidates: Iterable[Candidate]) -> set[str]:
    return {site for one in candidates for site in one.sites}


def _entries(choice: Choice, anatomy: Anatomy) -> dict[str, Entry]:
    candidate = choice.candidate
    terms = OPERATORS[candidate.operator].terms([anatomy[name] for name in candidate.sites], choice.ranks)
    share = choice.damage / len(terms)
    return {name: Entry(candidate.operator, own, share) for name, own in terms.items()}


def _entries_by_rows(choices: Sequence[Choice], anatomy: Anatomy) -> dict[str, Entry]:
    """Entries of the embedding tables, each put together from the choices for its runs of rows."""
    runs: dict[str, list[Choice]] = {}
    for choice in choices:
        if choice.candidate.rows is not None:
            runs.setdefault(choice.candidate.sites[0], []).append(choice)
    entries = {}
    for name, several in runs.items():
        operator = next((one.candidate.operator for one in several if one.candidate.operator != KEEP), KEEP)
        chosen = [(one.candidate.rows, one.ranks) for one in several if one.candidate.rows is not None]
        by_rows = OPERATORS[operator].rows
        terms = () if by_rows is None else by_rows.terms(anatomy[name], chosen)
        entries[name] = Entry(operator if terms else KEEP, terms, sum(one.damage for one in several))
    return entries


def _account(solution: Solution) -> dict[str, float | None]:
    return {
        "damage": solution.damage,
        "bound": solution.bound,
        "gap": solution.relative_gap,
        "multiplier": solution.multiplier,
    }
