"""States of whole layers in a plan: dropped, or reusing the attention of a layer below; and checks that entries match.

A layer is named ``stack.layer`` (``encoder.3``); a layer that computes everything itself has no state. Others are *dropped*
(ShortGPT, Men et al., 2024), multiply their values by the attention weights of a layer below (Xiao et al., 2019; Reuse
Transformer, Bhojanapalli et al., 2021), or attend with their queries to the keys and values of a layer below (cross-layer
attention, Brandon et al., 2024).
"""

from __future__ import annotations

from collections.abc import Mapping

from hpr.anatomy.model import Anatomy, Site
from hpr.errors import PlanError

DROPPED = "dropped"
WEIGHTS = "attention reused"
KEYS = "keys and values reused"
STATES = (DROPPED, WEIGHTS, KEYS)
REUSED = "reused"  # the operator of a site whose weight, or some of whose rows, no longer have an effect


def site_layer(site: Site) -> str | None:
    """The name of the layer that a site belongs to; None outside the stacks."""
    return None if site.stack is None else f"{site.stack}.{site.layer}"


def source(states: Mapping[int, str], layer: int) -> int | None:
    """The nearest layer below that computes what a layer reuses, None if there is none.

    ``states``: layer → state, for the layers of one stack that have one. Attention weights come from a layer that computes
    them, from its keys or those of another layer; keys and values come from a layer that computes both.

    >>> source({2: WEIGHTS, 3: WEIGHTS}, 3)
    1
    """
    allowed = ("", KEYS) if states.get(layer) == WEIGHTS else ("",)
    return next((below for below in range(layer - 1, -1, -1) if states.get(below, "") in allowed), None)


def paths_of(anatomy: Anatomy, states: Mapping[str, str]) -> dict[str, str]:
    """The same states by the paths of the blocks, below the base model."""
    stacks = {stack.name: stack for stack in anatomy.stacks}
    paths = {}
    for name, state in states.items():
        stack, _, number = name.rpartition(".")
        paths[stacks[stack].block(number)] = state
    return paths


def check_states(layers: Mapping[str, str], counts: Mapping[str, int]) -> None:
    """Raise ``PlanError`` for a layer or state that does not exist, and for a lowest layer with a state.

    ``counts``: the number of layers of each stack.
    """
    for name, state in layers.items():
        stack, _, number = name.rpartition(".")
        if stack not in counts or not number.isdigit() or int(number) >= counts[stack]:
            present = ", ".join(f"{stack}.0 to {stack}.{count - 1}" for stack, count in counts.items()) or "none"
            raise PlanError(f"layers: there is no layer {name!r}; this model has {present}: correct the name")
        if state not in STATES:
            raise PlanError(f"layer {name}: {state!r} is no state of a layer: leave it out, or choose {', '.join(STATES)}")
        if int(number) == 0:
            raise PlanError(f"layer {name} is the lowest of its stack and cannot be {state!r}: remove its state")


def check_entries(
    anatomy: Anatomy, layers: Mapping[str, str], removed: Mapping[str, int], operators: Mapping[str, tuple[str, bool]]
) -> None:
    """Raise ``PlanError`` if entries contradict the states; ``operators``: site → operator, and whether it has terms."""
    for name, (operator, has_terms) in operators.items():
        layer = site_layer(anatomy[name])
        state = layers.get(layer or "", "")
        if (operator == DROPPED) != (state == DROPPED):
            raise PlanError(
                f"{name}: its operator is {operator!r}, the state of its layer {state!r}: "
                f"make sure that both are {DROPPED!r}, or neither"
            )
        if operator == DROPPED and has_terms:
            raise PlanError(f"{name}: a dropped site has no terms: remove them")
        if operator == REUSED and state not in (WEIGHTS, KEYS):
            raise PlanError(
                f"{name}: it is {REUSED!r}, but layer {layer} reuses nothing: give the layer a state, or keep the site"
            )
    for path, count in removed.items():
        if not layers:
            raise PlanError(f"removed: {path} cannot be removed, because no layer is dropped or reuses anything: leave it out")
        if type(count) is not int or count < 0:
            raise PlanError(f"removed: {path} with {count!r} parameters: write a whole number from 0 up")
