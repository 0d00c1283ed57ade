"""Make a routed model static: replace the output of each router with its mean."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hpr.errors import HprError
from hpr.nn.bank import Factor, bank_of, module_name
from hpr.nn.routed import RoutedLinear
from hpr.nn.router import forget_masks, recorded
from hpr.plans.terms import FactorShape
from hpr.runtime.batch import BatchLike
from hpr.runtime.hooks import eval_mode, run, to_device_of
from hpr.sharing.specification import note_specification


@torch.no_grad()
def collapse(student: nn.Module, batches: Sequence[BatchLike]) -> nn.Module:
    """A static copy of the model, in which every router returns its mean output over the positions of the batches.

    Exporters and ``unshare`` need a static model. ``hpr.evaluate(static, student, …)`` measures what the copy loses. Raises
    ``HprError`` if the model's weights do not depend on the input, and if there are no batches.
    """
    if not batches:
        raise HprError("batches is empty: give at least one to average the routes over")
    static = copy.deepcopy(student)
    bank = bank_of(static)
    sites = [module for module in static.modules() if isinstance(module, RoutedLinear)]
    if bank is None or not sites:
        raise _static_already(student)
    averages = mean_routes(static, batches)
    for module in sites:
        module.set_terms(
            [term if term.route is None else replace(term, route=replace(term.route, per="fixed")) for term in module.terms]
        )
    for router, alpha in averages.items():
        old = bank[router]
        factor = Factor(FactorShape(len(alpha), 1), old.weight.dtype).to(old.weight.device)
        factor.weight.copy_(alpha.clamp(min=1e-9).log().unsqueeze(1))
        bank.factors[module_name(router)] = factor.requires_grad_(old.weight.requires_grad)
    forget_masks(static)
    note_specification(static)
    return static


@torch.no_grad()
def mean_routes(student: nn.Module, batches: Sequence[BatchLike]) -> dict[str, Float[Tensor, " experts"]]:
    """Router → its mean α in float64, over all positions of the batches that are not padding.

    Raises ``HprError`` if the model shares nothing.
    """
    bank = bank_of(student)
    if bank is None:
        raise _static_already(student)
    sums: dict[str, Tensor] = {}
    counts: dict[str, float] = {}
    with eval_mode(student):
        for batch in batches:
            with recorded(bank.routing) as records:
                run(student, to_device_of(batch, student))
            for (_, router), calls in records.items():
                for weights, counted in calls:
                    rows = weights.flatten(0, -2) if counted is None else weights[counted.bool()]
                    sums[router] = sums.get(router, torch.zeros(weights.shape[-1]).double()) + rows.double().sum(0).cpu()
                    counts[router] = counts.get(router, 0.0) + len(rows)
    return {router: total / counts[router] for router, total in sums.items()}


def _static_already(student: nn.Module) -> HprError:
    name = type(student).__name__
    return HprError(f"the weights of this {name} do not depend on the input: it is static already, use it as it is")
