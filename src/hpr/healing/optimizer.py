"""Parameter groups of the optimizer, each with a learning rate of its own."""

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
SMALLEST = 1e-3  # root mean square: biases that are nearly 0 move all the same


def groups(
    student: nn.Module, rate: float, shared_rate: float, delta_decay: float, router_rate: float = ROUTER_RATE
) -> list[dict[str, Any]]:
    """Parameters of an optimiser, each once, in a group of its own: factors that several sites share count once.

    A step of AdamW moves every number by about its rate, whatever the scale of its factor, so a rate is relative
    to the root mean square of its parameter (as in Adafactor, Shazeer & Stern 2018). Shared factors get
    ``shared_rate`` times it and no weight decay; private low-rank factors beside a shared one are pulled back to what is
    shared by ``delta_decay``; all else decays not at all. Routers start at 0: their scale is that at which a Linear is drawn,
    and they get ``router_rate`` times the rate (30 times did harm, see ``experiments.md``).
    """
    shared, deltas, routers = _roles(student)
    found = []
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
            lr = rate * scale * (shared_rate if factor in shared else 1.0)
            found.append({"params": [parameter], "lr": lr, "weight_decay": delta_decay if factor in deltas else 0.0})
    if not found:
        raise HprError(f"no parameter of this {type(student).__name__} takes a gradient: nothing can be healed")
    return found


def _roles(student: nn.Module) -> tuple[set[str], set[str], set[str]]:
    """Keys of factors that several sites read, of private ones whose site also reads a shared one, and of routers."""
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
