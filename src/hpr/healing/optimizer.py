"""Parameter groups of the optimiser: each parameter has its own learning rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hpr.errors import HprError
from hpr.healing.distributed import whole
from hpr.nn.bank import BANK, bank_of, module_name, terms_of
from hpr.plans.owners import owners
from hpr.plans.terms import factors_of, routers_of

ROUTER_RATE = 1.0
SMALLEST = 1e-3  # smallest root mean square that counts, so that biases near 0 move too


def parameter_groups(
    student: nn.Module, learning_rate: float, shared_rate: float, delta_decay: float, router_rate: float = ROUTER_RATE
) -> list[dict[str, Any]]:
    """Return one group per unique parameter, with its learning rate and weight decay, for ``torch.optim.AdamW``.

    A step of AdamW moves every number by about its learning rate, whatever the scale of its factor. So the learning rate is
    relative to the root mean square of the parameter (as in Adafactor, Shazeer & Stern 2018). Factors that several sites share
    get ``shared_rate`` times it. Private low-rank factors at a site that also reads a shared factor
    decay by ``delta_decay``, which pulls the site back to the shared factor; nothing else decays. Routers start at 0, so their
    scale is that of a newly drawn Linear, and they get ``router_rate`` times the learning rate
    (30 times did harm, see ``docs/experiments.md``).

    Raises ``HprError`` for weights that are not float32 or float64, and if no parameter takes a gradient.
    """
    shared, deltas, routers = _roles(student)
    groups = []
    for name, parameter in student.named_parameters():
        if parameter.requires_grad:
            factor = name.rsplit(f"{BANK}.factors.", 1)[-1].removesuffix(".weight") if f"{BANK}.factors." in name else None
            if parameter.dtype not in (torch.float32, torch.float64):
                raise HprError(
                    f"{name} is {str(parameter.dtype).removeprefix('torch.')}: most steps would be lost in rounding. Heal "
                    f"student.float(), with Recipe(bf16=True) for products in bfloat16"
                )
            if factor in routers:
                scale = router_rate * parameter.shape[-1] ** -0.5
            else:
                scale = max(float(whole(parameter.detach()).float().square().mean().sqrt()), SMALLEST)
            lr = learning_rate * scale * (shared_rate if factor in shared else 1.0)
            groups.append({"params": [parameter], "lr": lr, "weight_decay": delta_decay if factor in deltas else 0.0})
    if not groups:
        raise HprError(f"no parameter of this {type(student).__name__} takes a gradient: nothing can be healed")
    return groups


def _roles(student: nn.Module) -> tuple[set[str], set[str], set[str]]:
    """Keys of the factors that several sites read, of private factors at sites that also read a shared one, and of routers."""
    if bank_of(student) is None:
        return set(), set(), set()
    sites = terms_of(student)
    shared = {factor for factor, users in owners(sites).items() if len(users) > 1}
    deltas: set[str] = set()
    for terms in sites.values():
        private = [term for term in terms if shared.isdisjoint(term.factors)]
        if len(private) < len(terms):
            deltas.update(factors_of(private))
    routers = {router for terms in sites.values() for router in routers_of(terms)}
    keys = [{module_name(name) for name in names} for names in (shared, deltas - routers, routers)]
    return keys[0], keys[1], keys[2]
