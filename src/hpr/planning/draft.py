"""A draft holds all measured candidates of a model, and proposes plans for any budget.

The solver works with numbers alone; this module turns its choices into entries of a ``Plan``. A draft can be narrowed to some
sites, or to the sites that remain if some layers are dropped or reuse attention.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence, Set
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hpr.anatomy.model import Anatomy, Site
from hpr.anatomy.symmetry import AlignTarget, Symmetry
from hpr.errors import BudgetError
from hpr.operators import damping
from hpr.operators.alignment import symmetry_groups
from hpr.operators.registry import OPERATORS
from hpr.planning.search import Search
from hpr.plans.budget import Budget, parse_budget
from hpr.plans.plan import Plan
from hpr.plans.terms import KEEP, Entry
from hpr.solver.candidates import Choice, Solution, Track

if TYPE_CHECKING:
    from hpr.layer_reuse.reuse import Reuse
    from hpr.planning.dial import Dial

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Proposal:
    """A plan and its Lagrange ``multiplier``: the nats per example that one more parameter would save.

    ``score``: the measured divergence of the plan in nats per example, None before it is measured. ``price``: the nats per
    millisecond or operation, if a dial limits them.
    """

    plan: Plan
    multiplier: float
    score: float | None = None
    price: float = 0.0


@dataclass(frozen=True)
class Draft:
    """All measured candidates of a model. ``fixed`` sites stay as they are.

    ``searches``: the candidates of the model, then those of its aligned copy if alignment may pay. Plans come from both.
    ``dial``: what time or operations may be, if that is limited; ``outside``: what a call costs beside the sites, if layers
    have states.

    >>> draft = hpr.planning.planner.draft(model, profile)  # doctest: +SKIP
    >>> plans = draft.alternatives(draft.budget("50%"), 4)  # doctest: +SKIP
    """

    anatomy: Anatomy
    searches: tuple[Search, ...]
    fixed: tuple[Site, ...]
    bytes_per_parameter: float
    only: str | None = None
    reuse: Reuse | None = None
    dial: Dial | None = None
    outside: float | None = None

    @property
    def tracks(self) -> tuple[Track, ...]:
        """The candidates of the model without alignment."""
        return self.searches[0].tracks

    @property
    def plain(self) -> Draft:
        """The same draft without alignment."""
        return replace(self, searches=self.searches[:1])

    def dialled(self, dial: Dial) -> Draft:
        """The same candidates with what each costs in one call, and with a limit on the total."""
        searches = tuple(replace(search, tracks=dial.priced(search.tracks, self.anatomy)) for search in self.searches)
        return replace(self, searches=searches, dial=dial)._limited()

    def reusing(self, reuse: Reuse, outside: float | None = None) -> Draft:
        """The same candidates for the sites that remain if some layers are dropped or reuse the attention of others.

        ``outside``: what a call then costs beside the sites, for a draft with a dial.
        """
        gone = set(reuse.dead_weights.rows)
        left = self._with_sites({site.name for site in self.anatomy.sites} - gone, gone)
        return replace(left, reuse=reuse, outside=outside)._limited()

    def narrowed(self, only: str) -> Draft:
        """The same candidates for the sites that match the pattern ``only``; all other sites stay as they are."""
        left = self._with_sites({site.name for site in self.anatomy.select(only)})
        return replace(left, only=only, reuse=None, outside=None)._limited()

    def limit(self, budget: Budget) -> int:
        """Parameters left for the planned sites. Raises ``BudgetError``, with the least budget, if too few are left."""
        limit = budget.parameters - self.untouched
        if limit < self._smallest:
            raise BudgetError(f"a budget of {budget.text} is {budget.parameters:,} parameters, but {self._least()}")
        self._check_dial(limit, budget)
        return limit

    @property
    def untouched(self) -> int:
        """Parameters that no plan changes: biases, norms, sites without gradient and sites outside ``only``."""
        kept = self.anatomy.other_parameters + sum(site.parameters for site in self.fixed)
        if self.reuse is None:
            return kept
        dead = sum(self.anatomy[name].parameters for name in self.reuse.dead_weights.rows)
        return kept + dead - self.reuse.parameters(self.anatomy)

    def budget(self, text: str) -> Budget:
        """The budget that a text (50%, 11M, 45MB) means for this model. Raises ``BudgetError`` if it cannot be read."""
        return parse_budget(text, self.anatomy, self.bytes_per_parameter, self.only)

    def best(self, budget: Budget) -> Plan:
        """The plan of least predicted damage of all searches, which try all operators together and each one alone.

        Raises ``BudgetError``, with the least budget, if no plan meets the budget.
        """
        return self.propose(budget).plan

    def propose(self, budget: Budget) -> Proposal:
        """``best`` with its Lagrange multiplier."""
        return min((self._best(search, budget) for search in self.searches), key=_damage)

    def alternatives(self, budget: Budget, count: int) -> list[Plan]:
        """The plans of ``proposals``."""
        return [proposal.plan for proposal in self.proposals(budget, count)]

    def proposals(self, budget: Budget, count: int) -> list[Proposal]:
        """Up to ``count`` different plans worth measuring, the plan of least predicted damage first.

        In order: the best plan, the best plan without each operator that it uses (which helps if the predicted damage of an
        operator is too low), then the best structures of the K-best search. If alignment may pay, the last plan is the best
        one of the worse of the two searches, aligned or not. Raises ``BudgetError`` as ``best`` does.
        """
        better, *worse = sorted(self.searches, key=lambda search: _damage(self._best(search, budget)))
        others = [self._best(search, budget) for search in worse][: count - 1]
        return [*self._unlike(better, budget, count - len(others)), *others]

    def without(self, operator: str, budget: Budget) -> Plan:
        """The best plan that does not use one operator. Raises ``BudgetError`` if no such plan meets the budget."""
        limit = budget.parameters - self.untouched
        plans = [self.plan(search.without(operator, limit), budget, search.alignment) for search in self.searches]
        return min(plans, key=lambda plan: plan.damage)

    def plan(self, solution: Solution, budget: Budget, alignment: tuple[AlignTarget, ...] = ()) -> Plan:
        """The plan of a solution, with one entry per site in model order. ``alignment``: that of the solution's search."""
        entries = {site.name: Entry(KEEP) for site in self.fixed}
        for choice in solution.choices:
            if choice.candidate.rows is None:
                entries |= _entries(choice, self.anatomy)
        entries |= _entries_by_rows(solution.choices, self.anatomy)
        entries |= {name: Entry(KEEP) for name in (self.reuse.dead_weights.rows if self.reuse else ())}  # replaced below
        plan = Plan(
            model_class=self.anatomy.model_class,
            fingerprint=self.anatomy.fingerprint,
            budget=budget,
            dense_parameters=self.anatomy.total_parameters,
            other_parameters=self.anatomy.other_parameters,
            entries={site.name: entries[site.name] for site in self.anatomy.sites},
            diagnostics={
                "label": solution.label,
                "solver": _account(solution),
                "damping": {"input": damping.INPUT, "output": damping.OUTPUT},
            },
            stacks=self.anatomy.stacks,
        )
        plan = replace(plan, alignment=_used(alignment, plan, self.anatomy))
        plan = plan if self.reuse is None else _with_reuse(plan, self.anatomy, self.reuse)
        if self.dial is None:
            return plan
        return replace(plan, diagnostics={**plan.diagnostics, **self.dial.described(plan, self.outside)})

    def _best(self, search: Search, budget: Budget) -> Proposal:
        return self._proposal(search, search.best(self.limit(budget)), budget)

    def _unlike(self, search: Search, budget: Budget, count: int) -> list[Proposal]:
        """Up to ``count`` proposals of one search, each of another structure."""
        limit = self.limit(budget)
        solutions = [search.best(limit)]
        used = {choice.candidate.operator for choice in solutions[0].choices if choice.candidate.rows is None} - {KEEP}
        if len(used) > 1:
            for operator in sorted(used):
                try:
                    solutions.append(search.without(operator, limit))
                except BudgetError:
                    _log.info("no plan within %s without %s", budget.text, operator)
        solutions += search.k_best(limit, count)
        unique: dict[Any, Solution] = {}
        for solution in solutions:
            unique.setdefault(solution.structure, solution)
        return [self._proposal(search, solution, budget) for solution in list(unique.values())[:count]]

    def _proposal(self, search: Search, solution: Solution, budget: Budget) -> Proposal:
        return Proposal(self.plan(solution, budget, search.alignment), solution.multiplier or 0.0, price=solution.price)

    def _with_sites(self, chosen: set[str], gone: Set[str] = frozenset()) -> Draft:
        """The same candidates for the chosen sites; sites that are not planned and not ``gone`` are fixed."""
        searches = tuple(search.narrowed(chosen) for search in self.searches)
        planned = searches[0].sites
        return replace(
            self, searches=searches, fixed=tuple(site for site in self.anatomy.sites if site.name not in planned | gone)
        )

    def _limited(self) -> Draft:
        """The same draft with the ceiling of its dial, if it has one."""
        if self.dial is None:
            return self
        ceiling = self.dial.ceiling(self.fixed, self.outside, {} if self.reuse is None else self.reuse.dead_weights.rows)
        return replace(self, searches=tuple(replace(search, ceiling=ceiling) for search in self.searches))

    def _check_dial(self, limit: int, budget: Budget) -> None:
        """Raise ``BudgetError`` if no plan within a number of parameters is as fast as the dial asks."""
        if self.dial is None:
            return
        for search in self.searches:
            least = search.least_cost(limit)
            if search.ceiling is not None and least > search.ceiling:
                cost = self.dial.allowed - search.ceiling + least
                raise self.dial.impossible(cost, f"the fastest plan within {budget.text} is predicted to have")

    @property
    def _smallest(self) -> int:
        """The fewest parameters of the planned sites that every search can meet."""
        return max(1, *(search.smallest for search in self.searches))

    def _least(self) -> str:
        smallest = self.untouched + self._smallest
        share = 100 * smallest / self.anatomy.total_parameters
        return (
            f"the smallest plan of this model needs {smallest:,} ({share:.1f}% of all): "
            f"{self.untouched:,} of them are biases, norms and sites that are not to be changed. Raise the budget"
        )


def _damage(proposal: Proposal) -> float:
    return proposal.plan.damage


def _with_reuse(plan: Plan, anatomy: Anatomy, reuse: Reuse) -> Plan:
    """The plan with states of layers, their damage spread over the sites without effect."""
    from hpr.layer_reuse.reuse import with_layers  # an optional feature: other plans never load it

    plan = with_layers(plan, anatomy, reuse.states, reuse.dead_weights)
    share = reuse.damage / len(reuse.dead_weights.rows)
    spread = {name: replace(plan.entries[name], damage=share) for name in reuse.dead_weights.rows}
    states = ", ".join(f"{layer} {state}" for layer, state in reuse.states.items())
    label = f"{plan.diagnostics['label']}, {states}"
    return replace(plan, entries={**plan.entries, **spread}, diagnostics={**plan.diagnostics, "label": label})


def _used(targets: Sequence[AlignTarget], plan: Plan, anatomy: Anatomy) -> tuple[AlignTarget, ...]:
    """The targets of every attention and feed-forward in which the plan shares at least one site."""
    sharing = [anatomy[name] for names in plan.groups() for name in names]
    used: set[Symmetry] = set()
    for group in symmetry_groups([target.symmetry for target in targets]):
        if any(
            target.touches(site) for target in targets if target.symmetry in group for site in sharing if site.expert is None
        ):
            used |= set(group)
    return tuple(target for target in targets if target.symmetry in used)


def _entries(choice: Choice, anatomy: Anatomy) -> dict[str, Entry]:
    candidate = choice.candidate
    terms = OPERATORS[candidate.operator].terms([anatomy[name] for name in candidate.sites], choice.ranks)
    share = choice.damage / len(terms)
    return {name: Entry(candidate.operator, site_terms, share) for name, site_terms in terms.items()}


def _entries_by_rows(choices: Sequence[Choice], anatomy: Anatomy) -> dict[str, Entry]:
    """Entries of the embedding tables; each joins the choices for the runs of rows of one table."""
    runs: dict[str, list[Choice]] = {}
    for choice in choices:
        if choice.candidate.rows is not None:
            runs.setdefault(choice.candidate.sites[0], []).append(choice)
    entries = {}
    for name, table_choices in runs.items():
        operator = next((choice.candidate.operator for choice in table_choices if choice.candidate.operator != KEEP), KEEP)
        chosen = [(choice.candidate.rows, choice.ranks) for choice in table_choices if choice.candidate.rows is not None]
        by_rows = OPERATORS[operator].rows
        terms = () if by_rows is None else by_rows.terms(anatomy[name], chosen)
        entries[name] = Entry(operator if terms else KEEP, terms, sum(choice.damage for choice in table_choices))
    return entries


def _account(solution: Solution) -> dict[str, float | None]:
    return {
        "damage": solution.damage,
        "bound": solution.bound,
        "gap": solution.relative_gap,
        "multiplier": solution.multiplier,
    }
