"""What each layer is worth: the measured divergence if it is dropped, or reuses what the layer below computes.

Curvature cannot predict this, because the change is not small. Single interventions rank the layers (ShortGPT, Men et al. 2024,
ranks them by block influence). Sets of layers, each one larger, are then measured together, because damages do not add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import nn

from hpr.anatomy.describe import describe
from hpr.evaluation.divergence import divergence
from hpr.layer_reuse.dead_weights import dead_weights
from hpr.layer_reuse.install import droppable, reusable, with_states
from hpr.layer_reuse.reuse import Interventions, Reuse
from hpr.plans.layer_states import DROPPED, KEYS, WEIGHTS
from hpr.profiling.objectives import Objective
from hpr.runtime.batch import BatchLike
from hpr.runtime.progress import progress

MOST_LAYERS = 6  # that one plan may drop or let reuse


def intervene(model: nn.Module, batches: Sequence[BatchLike], objective: Objective) -> dict[str, dict[str, float]]:
    """The divergence for each layer alone in each possible state: layer name → state → nats per example.

    Each intervention takes two forward passes. Layers that cannot change are not listed.
    """
    anatomy = describe(model)
    reuse, drop = reusable(model, anatomy), droppable(model, anatomy)
    wanted = [
        (layer, state)
        for layer in reuse
        for state, reasons in ((WEIGHTS, reuse), (KEYS, reuse), (DROPPED, drop))
        if reasons[layer] is None
    ]
    found: dict[str, dict[str, float]] = {}
    for done, (layer, state) in enumerate(wanted, 1):
        changed = with_states(model, {layer: state})
        found.setdefault(layer, {})[state] = divergence(changed, model, batches, objective).mean
        progress("interventions", done, len(wanted))
    return found


def reuses(
    model: nn.Module,
    interventions: Interventions,
    batches: Sequence[BatchLike],
    objective: Objective,
    worth: Callable[[Reuse], float],
) -> list[Reuse]:
    """A few sets of layers that reuse, each with one layer more than the last, measured together.

    ``worth``: the nats that what a set saves is worth elsewhere; by the multiplier of a plan without reuse, for instance. A
    layer is changed if what it saves is worth more than its damage. It gets the state with the largest gain, and layers are
    added in order of gain. The price falls as more is saved, so these sets are only proposals.
    """
    ranked = []
    for layer, damages in interventions.items():
        options = []
        for state, damage in damages.items():
            alone = Reuse({layer: state}, dead_weights(model, {layer: state}, batches[0]), damage)
            if (gain := worth(alone) - damage) > 0:
                options.append((gain, state))
        if options:
            ranked.append((*max(options), layer))
    chosen = [(layer, state) for _, state, layer in sorted(ranked, reverse=True)[:MOST_LAYERS]]
    return list(_growing(model, chosen, batches, objective))


def drops(
    model: nn.Module, interventions: Interventions, batches: Sequence[BatchLike], objective: Objective
) -> Iterator[Reuse]:
    """Sets of dropped layers, each with one layer more than the last, measured together; the least harmful layers first."""
    ranked = sorted((damages[DROPPED], layer) for layer, damages in interventions.items() if DROPPED in damages)
    return _growing(model, [(layer, DROPPED) for _, layer in ranked], batches, objective)


def _growing(
    model: nn.Module, ranked: Sequence[tuple[str, str]], batches: Sequence[BatchLike], objective: Objective
) -> Iterator[Reuse]:
    states: dict[str, str] = {}
    for number, (layer, state) in enumerate(ranked, 1):
        states[layer] = state
        damage = divergence(with_states(model, states), model, batches, objective).mean
        progress("reuse", number, len(ranked))
        yield Reuse(dict(states), dead_weights(model, states, batches[0]), damage)
