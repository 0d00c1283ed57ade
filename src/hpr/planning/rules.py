"""Reuse by rule: the user says which layers replicate hidden states and attention weights of the layer below.

The rules have the form of hierarchical parameter replication: one dictionary per stack, with one value per layer for
``hidden_states`` and one for ``attention_weights``. Nothing is fitted, so no profile is needed: a layer that shares computes
with the parameters of the layer below.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from hpr.anatomy.describe import describe
from hpr.anatomy.lookup import weight_at
from hpr.anatomy.model import Anatomy, Site, Stack
from hpr.anatomy.swappable import not_swappable
from hpr.errors import PlanError
from hpr.operators import naming, tie
from hpr.operators.fitting import Fitted
from hpr.plans.budget import Budget
from hpr.plans.layer_states import DROPPED, REUSED, WEIGHTS, site_layer
from hpr.plans.plan import Plan, keep_all
from hpr.plans.terms import KEEP, Entry, Term, factors_of
from hpr.profiling.objectives import objective_for
from hpr.runtime.batch import Batch


@dataclass(frozen=True)
class ByRule:
    """Replication rules that ``hpr.share`` accepts in place of a plan. Like a preset, they fit nothing."""

    rules: Rules
    batch: Batch | None = None
    name: str = "replication rules"

    def read(self, model: nn.Module) -> Replication:
        """The layers that the rules name in a model, as a ``Replication``. Raises ``PlanError`` as ``replication`` does."""
        return replication(self.rules, model, describe(model))

    def plan(self, model: nn.Module) -> Plan:
        """A validated plan, whose budget is the number of parameters that it needs.

        Raises ``PlanError`` as ``replication`` does.
        """
        anatomy, replicated = describe(model), self.read(model)
        plan = keep_all(anatomy)
        states = dict.fromkeys(replicated.copied, DROPPED) | dict.fromkeys(replicated.reused, WEIGHTS)
        if states:
            from hpr.layer_reuse.dead_weights import dead_weights  # an optional feature: other rules never load it
            from hpr.layer_reuse.reuse import with_layers

            plan = with_layers(plan, anatomy, states, dead_weights(model, states, self.batch))
        bound = not_swappable(model, anatomy)
        entries = dict(plan.entries)
        for members in _groups(anatomy, replicated):
            if not bound.keys() & {site.name for site in members}:
                entries |= _tied(members, plan)
        plan = replace(plan, entries=entries, diagnostics={"label": self.name})
        plan = replace(plan, budget=Budget(self.name, plan.parameters(anatomy)))
        plan.validate(anatomy)
        return plan

    def fit(self, model: nn.Module, anatomy: Anatomy, plan: Plan) -> Fitted:
        """Factor name → the weight of the lowest layer that uses it, (out, in), or the rows of it that the factor covers.

        Raises ``PlanError`` if the plan needs factors that rules do not make.
        """
        factors: dict[str, torch.Tensor] = {}
        for site in sorted(anatomy.sites, key=lambda site: site.layer or 0):
            for term in plan.entries[site.name].terms:
                start, stop = term.rows or (0, site.out_features)
                factors.setdefault(term.u, weight_at(model, site).detach()[start:stop])
        needed = {name for entry in plan.entries.values() for name in factors_of(entry.terms)}
        if set(factors) != needed:
            raise PlanError(f"the plan needs factors that rules do not give: {sorted(needed - set(factors))}: use ByRule.plan")
        return Fitted(factors, {})


def _groups(anatomy: Anatomy, replicated: Replication) -> Iterable[list[Site]]:
    """Sites that will read the same weight: the site of the layer that lends its parameters, then the sites above it."""
    by_layer: dict[str, dict[tuple[str, int | None], Site]] = {}
    for site in anatomy.sites:
        if site.kind == "linear" and (layer := site_layer(site)) is not None:
            by_layer.setdefault(layer, {})[site.slot, site.expert] = site
    borrowers: dict[str, list[str]] = {}
    for layer, owner in replicated.computed_with.items():
        borrowers.setdefault(owner, []).append(layer)
    for owner, layers in borrowers.items():
        for key, site in by_layer.get(owner, {}).items():
            others = [by_layer[layer][key] for layer in layers if key in by_layer[layer]]
            yield [
                site,
                *(
                    other
                    for other in others
                    if (other.out_features, other.in_features) == (site.out_features, site.in_features)
                ),
            ]


def _tied(members: list[Site], plan: Plan) -> dict[str, Entry]:
    """Entries that share every row that two or more sites use. Some sites use only the value rows of a fused projection."""
    rows = {site.name: _rows(site, plan.entries[site.name]) for site in members}
    cuts = sorted({cut for runs in rows.values() for run in runs for cut in run})
    terms: dict[str, list[Term]] = {site.name: [] for site in members}
    group = naming.group_name(members)
    shared = False
    for start, stop in pairwise(cuts):
        users = [name for name, runs in rows.items() if any(first <= start and stop <= last for first, last in runs)]
        shared |= len(users) > 1
        for name in users:
            whole = len(cuts) == 2
            terms[name].append(Term(group if whole else f"{group}.{start}-{stop}", rows=None if whole else (start, stop)))
    if not shared:
        return {}
    return {
        name: Entry(REUSED if plan.entries[name].operator == REUSED else tie.TIE, tuple(site_terms))
        for name, site_terms in terms.items()
        if site_terms
    }


def _rows(site: Site, entry: Entry) -> list[tuple[int, int]]:
    """The runs of rows of a site that have an effect."""
    if entry.operator == KEEP:
        return [(0, site.out_features)]
    return [term.rows or (0, site.out_features) for term in entry.terms]


HIDDEN, ATTENTION = "hidden_states", "attention_weights"
SHARE, COPY = "share", "copy"
ROLES = ("encoder", "decoder")
_VALUES: dict[str, tuple[Any, ...]] = {HIDDEN: (False, True, SHARE, COPY), ATTENTION: (False, True)}
Rules = Mapping[str, Mapping[str, Sequence[Any]]]


@dataclass(frozen=True)
class Replication:
    """The layers that the rules name in a model, by layer name (``encoder.3``).

    ``computed_with``: layer → the layer whose parameters it uses. ``copied``: layers that are skipped; the hidden states
    from below pass through unchanged. ``reused``: layers that use the attention weights of the layer below. ``notes``: rules
    without effect, each with the reason.
    """

    computed_with: dict[str, str] = field(default_factory=dict)
    copied: tuple[str, ...] = ()
    reused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def stacks_by_role(model: nn.Module, anatomy: Anatomy) -> dict[str, Stack]:
    """Stacks by name, and by ``encoder`` and ``decoder`` if the model has them.

    A stack has the role that its path names. If no path names a role and the model has one stack, the stack is a decoder in
    a language model that generates, and an encoder in any other model.
    """
    named = {stack.name: stack for stack in anatomy.stacks}
    roles = {role: stack for stack in anatomy.stacks for role in ROLES if role in stack.path.split(".")}
    if len(anatomy.stacks) == 1 and not roles:
        role = "decoder" if objective_for(model).shifts_labels else "encoder"
        roles[role] = anatomy.stacks[0]
    return named | roles


def replication(rules: Rules, model: nn.Module, anatomy: Anatomy) -> Replication:
    """The layers that share, copy or reuse under the rules. A rule has one value per layer; shorter lists repeat.

    ``hidden_states``: False, the layer has private parameters; True or ``"share"``, it computes with the parameters of the
    layer below; ``"copy"``, it is skipped and the hidden states from below are copied. ``attention_weights``: False, the layer
    computes them; True, it uses those of the layer below. Layer 0 has no layer below, so any value there means False. Rules
    for an encoder or a decoder that the model lacks become notes. Raises ``PlanError`` for unknown stacks, rules and values,
    and for lists that are empty or longer than the stack.
    """
    if not isinstance(rules, Mapping):
        raise PlanError(f"replication_rules is a {type(rules).__name__}: give a dictionary such as {{'encoder': {{...}}}}")
    stacks = stacks_by_role(model, anatomy)
    replicated = Replication()
    name_by_path: dict[str, str] = {}
    for name, stack_rules in rules.items():
        if name not in stacks and name not in ROLES:
            names = ", ".join(repr(role) for role in dict.fromkeys((*ROLES, *stacks)))
            raise PlanError(f"replication_rules names a stack {name!r}; {anatomy.model_class} allows {names}: use one of these")
        if not isinstance(stack_rules, Mapping):
            form = f"{{{HIDDEN!r}: [...], {ATTENTION!r}: [...]}}"
            raise PlanError(f"the rules of {name!r} are a {type(stack_rules).__name__}: give {form}")
        if unknown := [key for key in stack_rules if key not in _VALUES]:
            raise PlanError(f"{name!r} has a rule {unknown[0]!r}; there are {HIDDEN!r} and {ATTENTION!r}: use one of these")
        stack = stacks.get(name)
        values = {rule: _values(name, rule, stack_rules.get(rule, (False,)), stack) for rule in _VALUES}
        if stack is None:
            replicated = _noted(replicated, f"{anatomy.model_class} has no {name}: its rules are without effect")
            continue
        if stack.path in name_by_path:
            raise PlanError(
                f"{name_by_path[stack.path]!r} and {name!r} are the same stack of {anatomy.model_class}: give rules for one"
            )
        name_by_path[stack.path] = name
        replicated = _add(replicated, stack, values[HIDDEN], values[ATTENTION])
    return replicated


def _values(name: str, rule: str, given: Any, stack: Stack | None) -> list[Any]:
    """One value per layer; the given list if the model has no such stack."""
    allowed = _VALUES[rule]
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise PlanError(f"{name!r}: {rule!r} is {given!r}: give a list with one value per layer")
    if not given:
        raise PlanError(f"{name!r}: {rule!r} is empty: give at least one value, it repeats for the layers above")
    for value in given:
        if not any(value is choice or (isinstance(value, str) and value == choice) for choice in allowed):
            raise PlanError(f"{name!r}: {value!r} means nothing for {rule!r}: give {', '.join(map(repr, allowed))}")
    if stack is None:
        return list(given)
    if len(given) > stack.layers:
        raise PlanError(
            f"{name!r}: {rule!r} has {len(given)} values, the stack has {stack.layers} layers: give {stack.layers} or less"
        )
    return [given[layer % len(given)] for layer in range(stack.layers)]


def _add(replicated: Replication, stack: Stack, hidden: Sequence[Any], attention: Sequence[Any]) -> Replication:
    computed_with, copied = dict(replicated.computed_with), list(replicated.copied)
    reused, notes = list(replicated.reused), list(replicated.notes)
    owner = f"{stack.name}.0"
    for layer in range(stack.layers):
        name = f"{stack.name}.{layer}"
        if layer == 0:
            if hidden[0] is not False or attention[0] is not False:
                notes.append(f"{name} has no layer below: it keeps its own parameters and attention weights")
            continue
        if hidden[layer] == COPY:
            copied.append(name)
            if attention[layer]:
                notes.append(f"{name} is skipped, so its rule for {ATTENTION} is without effect")
            continue
        if hidden[layer] in (True, SHARE):
            computed_with[name] = owner
        else:
            owner = name
        if attention[layer]:
            reused.append(name)
    return Replication(computed_with, tuple(copied), tuple(reused), tuple(notes))


def _noted(replicated: Replication, note: str) -> Replication:
    return replace(replicated, notes=(*replicated.notes, note))
