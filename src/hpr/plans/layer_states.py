"""What may become of a whole layer, and what that asks of a plan.

A layer is named ``stack.layer`` (``encoder.3``); one that computes all by itself is not listed. It may be *dropped*
(ShortGPT, Men et al., 2024); it may multiply its values by the attention weights of a layer below (Xiao et al., 2019; Reuse
Transformer, Bhojanapalli et al., 2021); or it may attend, with queries of its own, to the keys and values of a layer below
(cross-layer attention, Brandon et al., 2024).
"""

from __future__ import annotations

from collections.abc import Mapping

from hpr.anatomy.model import Anatomy, Site
from hpr.errors import HprError

DROPPED = "dropped"
WEIGHTS = "attention reused"
KEYS = "keys and values reused"
STATES = (DROPPED, WEIGHTS, KEYS)
REUSED = "reused"  # the operator of a site whose weight, or some of whose rows, no longer have an effect


def site_layer(site: Site) -> str | None:
    """The name of the layer that a site belongs to; None outside the stacks."""
    return None if site.stack is None else f"{site.stack}.{site.layer}"


def source(states: Mapping[int, str], layer: int) -> int | None:
    """The nearest layer below that has what a layer reuses; ``states`` are those of its stack. None where there is none.

    Attention weights come from a layer that computes them, be it from the keys of another; keys and values from one that has
    both of its own.
    """
    allowed = ("", KEYS) if states.get(layer) == WEIGHTS else ("",)
    return next((below for below in range(layer - 1, -1, -1) if states.get(below, "") in allowed), None)


def check_states(layers: Mapping[str, str], counts: Mapping[str, int]) -> None:
    """Raise ``HprError`` for a layer or state that does not exist, and for a lowest layer that is not its own.

    ``counts``: the number of layers of each stack.
    """
    for name, state in layers.items():
        stack, _, number = name.rpartition(".")
        if stack not in counts or not number.isdigit() or int(number) >= counts[stack]:
            known = ", ".join(f"{one}.0 to {one}.{count - 1}" for one, count in counts.items()) or "none"
            raise HprError(f"layers: there is no layer {name!r}; this model has {known}")
        if state not in STATES:
            raise HprError(f"layer {name}: {state!r} is no state of a layer; leave it out, or choose {', '.join(STATES)}")
        if int(number) == 0:
            raise HprError(f"layer {name} is the lowest of its stack and cannot be {state!r}: let it be its own")


def check_entries(
    anatomy: Anatomy, layers: Mapping[str, str], removed: Mapping[str, int], operators: Mapping[str, tuple[str, bool]]
) -> None:
    """Raise ``HprError`` where entries contradict the states; ``operators``: site → its operator, and whether it has terms."""
    for name, (operator, has_terms) in operators.items():
        layer = site_layer(anatomy[name])
        state = layers.get(layer or "", "")
        if (operator == DROPPED) != (state == DROPPED):
            raise HprError(f"{name}: it is {operator!r} and its layer {state or 'its own'!r}; both are {DROPPED!r}, or neither")
        if operator == DROPPED and has_terms:
            raise HprError(f"{name}: a dropped site has no terms: remove them")
        if operator == REUSED and state not in (WEIGHTS, KEYS):
            raise HprError(f"{name}: it is {REUSED!r}, but layer {layer} reuses nothing: give it the state, or plan to keep it")
    for path, count in removed.items():
        if not layers:
            raise HprError(f"removed: {path} cannot vanish where no layer is dropped or reuses anything: leave it out")
        if type(count) is not int or count < 0:
            raise HprError(f"removed: {path} with {count!r} parameters; write a whole number from 0 up")
