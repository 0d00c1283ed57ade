"""Reuse by rule: which layers replicate hidden states and attention weights of the layer below, said by hand.

The rules are those of the source of hierarchical parameter replication: one dictionary a stack, with one value per layer for
``hidden_states`` and one for ``attention_weights``. No profile is needed, since nothing is fitted: a layer that shares computes
with the very parameters of the layer below.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from hpr.anatomy import Anatomy, Stack
from hpr.errors import HprError
from hpr.profiling.objectives import objective_for

HIDDEN, ATTENTION = "hidden_states", "attention_weights"
SHARE, COPY = "share", "copy"
ROLES = ("encoder", "decoder")
_VALUES: dict[str, tuple[Any, ...]] = {HIDDEN: (False, True, SHARE, COPY), ATTENTION: (False, True)}
Rules = Mapping[str, Mapping[str, Sequence[Any]]]


@dataclass(frozen=True)
class Replication:
    """What the rules mean for a model, by layer name (``encoder.3``).

    ``computed_with``: layer → the layer whose parameters it uses. ``copied``: layers that are skipped, so that the hidden
    states below pass on. ``reused``: layers that take the attention weights of the layer below. ``notes``: rules without
    effect, and why.
    """

    computed_with: dict[str, str] = field(default_factory=dict)
    copied: tuple[str, ...] = ()
    reused: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def stacks_by_role(model: nn.Module, anatomy: Anatomy) -> dict[str, Stack]:
    """``encoder`` and ``decoder``, as far as the model has them, and every stack under its own name.

    A stack whose path says which it is, is that; the only stack of a language model that generates is a decoder, any
    other only stack an encoder.
    """
    named = {stack.name: stack for stack in anatomy.stacks}
    roles = {role: stack for stack in anatomy.stacks for role in ROLES if role in stack.path.split(".")}
    if len(anatomy.stacks) == 1 and not roles:
        role = "decoder" if objective_for(model).name == "causal-lm" else "encoder"
        roles[role] = anatomy.stacks[0]
    return named | roles


def replication(rules: Rules, model: nn.Module, anatomy: Anatomy) -> Replication:
    """Read the rules for one model: one value per layer, shorter lists repeat, longer ones are an error.

    ``hidden_states``: False, own parameters; True or ``"share"``, computed with the parameters of the layer below;
    ``"copy"``, the hidden states themselves are copied and the layer is skipped. ``attention_weights``: False, own; True, those
    of the layer below. Layer 0 has nothing below, so any value there means own. Rules for an encoder or a decoder that the
    model lacks are noted as without effect. Raises ``HprError`` for stacks that no model has, unknown rules, lists that
    are empty or longer than the stack, and values that mean nothing.
    """
    if not isinstance(rules, Mapping):
        raise HprError(f"replication_rules is a {type(rules).__name__}: give a dictionary such as {{'encoder': {{...}}}}")
    stacks = stacks_by_role(model, anatomy)
    found = Replication()
    taken: dict[str, str] = {}
    for name, own in rules.items():
        if name not in stacks and name not in ROLES:
            there = ", ".join(repr(one) for one in dict.fromkeys((*ROLES, *stacks)))
            raise HprError(f"replication_rules names a stack {name!r}; {anatomy.model_class} knows {there}: correct the name")
        if not isinstance(own, Mapping):
            form = f"{{{HIDDEN!r}: [...], {ATTENTION!r}: [...]}}"
            raise HprError(f"the rules of {name!r} are a {type(own).__name__}: give {form}")
        if unknown := [key for key in own if key not in _VALUES]:
            raise HprError(f"{name!r} has a rule {unknown[0]!r}; there are {HIDDEN!r} and {ATTENTION!r}")
        stack = stacks.get(name)
        values = {rule: _values(name, rule, own.get(rule, (False,)), stack) for rule in _VALUES}
        if stack is None:
            found = _noted(found, f"{anatomy.model_class} has no {name}: its rules are without effect")
            continue
        if stack.path in taken:
            raise HprError(f"{taken[stack.path]!r} and {name!r} are the same stack of {anatomy.model_class}: rule it once")
        taken[stack.path] = name
        found = _add(found, stack, values[HIDDEN], values[ATTENTION])
    return found


def _values(name: str, rule: str, given: Any, stack: Stack | None) -> list[Any]:
    """One value per layer; as given where there is no stack to fill."""
    allowed = _VALUES[rule]
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise HprError(f"{name!r}: {rule!r} is {given!r}: give a list with one value per layer")
    if not given:
        raise HprError(f"{name!r}: {rule!r} is empty: give at least one value, it repeats for the layers above")
    for value in given:
        if not any(value is one or (isinstance(value, str) and value == one) for one in allowed):
            raise HprError(f"{name!r}: {value!r} means nothing for {rule!r}: give {', '.join(repr(one) for one in allowed)}")
    if stack is None:
        return list(given)
    if len(given) > stack.layers:
        raise HprError(f"{name!r}: {rule!r} has {len(given)} values, the stack has {stack.layers} layers: leave some out")
    return [given[layer % len(given)] for layer in range(stack.layers)]


def _add(found: Replication, stack: Stack, hidden: Sequence[Any], attention: Sequence[Any]) -> Replication:
    computed_with, copied, reused, notes = dict(found.computed_with), list(found.copied), list(found.reused), list(found.notes)
    owner = f"{stack.name}.0"
    for layer in range(stack.layers):
        name = f"{stack.name}.{layer}"
        if layer == 0:
            if hidden[0] is not False or attention[0] is not False:
                notes.append(f"{name} has nothing below: it keeps its own parameters and attention weights")
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


def _noted(found: Replication, note: str) -> Replication:
    return Replication(found.computed_with, found.copied, found.reused, (*found.notes, note))
