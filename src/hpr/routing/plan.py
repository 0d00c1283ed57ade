"""Add routers to a plan, so that weights depend on the input.

W_s(x) = Σ_k α_k(x) · B_k: the experts B_k are the rank components of the static plan, dealt into K parts, so only the router
adds parameters. If a group of layers shares a basis, it shares the parts. A router starts at 0, which gives the static model
exactly, and learns in healing (``healing.loss.Weights.routing``). Ouroboros (arXiv 2604.02051) routed whole matrices and
found lower training loss and no gain on held-out data: compare at equal parameters before you use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hpr.anatomy.describe import describe
from hpr.anatomy.lookup import module_at
from hpr.anatomy.model import Anatomy
from hpr.errors import HprError
from hpr.planning.draft import Draft, Proposal
from hpr.plans.budget import Budget
from hpr.plans.plan import Plan
from hpr.plans.terms import Route
from hpr.runtime.batch import example_batch
from hpr.runtime.hooks import captured_hidden_states, entering, eval_mode, run

View = Literal["token", "sequence"]  # what a router sees of the input
_TRIES = 20  # of lowering a budget by what the routers cost


def routed(
    plan: Plan,
    model: nn.Module,
    experts: int = 4,
    per: View | Literal["auto"] = "auto",
    only: str | None = None,
) -> Plan:
    """The same plan with a router at every site of a stack that has a term with a rank.

    ``per``: what a router sees, by default a sequence in a stack where every position sees all others, and a token in any
    other. ``only`` narrows the sites. The routers' parameters count, so the plan may no longer keep within its budget (see
    ``best_routed``). Raises ``HprError`` where no site can be routed.
    """
    return _with_routes(plan, _routes(model, describe(model), experts, per, only), experts)


def best_routed(
    draft: Draft,
    budget: Budget,
    model: nn.Module,
    experts: int = 4,
    only: str | None = None,
    gains: Mapping[str, float] | None = None,
) -> Plan:
    """The best static plan that leaves room for its routers within a budget, with them.

    ``gains``: what a router would save at a site, as a share of its damage (``hpr.routing.expected_gains``); with them only
    those sites are routed where that is more than the router's parameters are worth elsewhere, which may be none.
    """
    room, routes = budget.parameters, _routes(model, draft.anatomy, experts, "auto", only)
    if gains is not None:
        static = draft.propose(budget)
        chosen = worth_routing(static, draft.anatomy, gains, experts)
        routes = {name: route for name, route in routes.items() if name in chosen}
        if not routes:
            return static.plan
    for _ in range(_TRIES):
        plan = _with_routes(draft.best(replace(budget, parameters=room)), routes, experts)
        excess = plan.parameters(draft.anatomy) - budget.parameters
        if excess <= 0:
            return replace(plan, budget=budget)
        room -= excess
    raise HprError(f"routers with {experts} experts do not fit {budget.text}: use fewer experts, or raise the budget")


def worth_routing(proposal: Proposal, anatomy: Anatomy, gains: Mapping[str, float], experts: int) -> set[str]:
    """Sites where a router saves more nats than its parameters would, at the price that they have in the plan."""
    plan, price = proposal.plan, proposal.multiplier
    cost = {name: price * experts * (anatomy[name].in_features + 1) for name in gains}
    return {name for name, gain in gains.items() if gain * plan.entries[name].damage > cost[name]}


def _routes(
    model: nn.Module, anatomy: Anatomy, experts: int, per: View | Literal["auto"], only: str | None
) -> dict[str, Route]:
    """Site → its route, for every Linear of a stack that is chosen."""
    whole = seeing_all(model, anatomy) if per == "auto" else set()
    routes = {}
    for site in anatomy.select(only):
        if site.kind == "linear" and site.expert is None and site.stack is not None:
            seen: View = "sequence" if site.stack in whole else "token"
            routes[site.name] = Route(f"{site.name}.router", experts, seen if per == "auto" else per)
    return routes


def _with_routes(plan: Plan, routes: Mapping[str, Route], experts: int) -> Plan:
    """A plan with routes at those terms that have a component for every expert."""
    entries = dict(plan.entries)
    for name, route in routes.items():
        terms = [replace(term, route=route) if (term.rank or 0) >= experts else term for term in entries[name].terms]
        entries[name] = replace(entries[name], terms=tuple(terms))
    if entries == dict(plan.entries):
        raise HprError(f"no site of this plan has a term of rank {experts} or more to be routed: lower experts, or plan anew")
    return replace(plan, entries=entries)


def seeing_all(model: nn.Module, anatomy: Anatomy) -> set[str]:
    """Names of the stacks in which the first position's output depends on the last one's input: not causal ones.

    Found by gradients on ``example_batch``; none in a model whose inputs it cannot tell.
    """
    try:
        batch = example_batch(model)
    except HprError:
        return set()
    entered: dict[str, Tensor] = {}

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = entering(args, kwargs)
            entered[name] = x if x.requires_grad else x.requires_grad_()

        return hook

    last = {stack.name: stack.blocks[-1] for stack in anatomy.stacks}
    handles = [
        module_at(model, stack.blocks[0]).register_forward_pre_hook(enter(stack.name), with_kwargs=True)
        for stack in anatomy.stacks
    ]
    try:
        with torch.enable_grad(), eval_mode(model), captured_hidden_states(model, list(last.values())) as left:
            run(model, batch)
        return {name for name, path in last.items() if path in left and _sees_last(entered[name], left[path])}
    finally:
        for handle in handles:
            handle.remove()


def _sees_last(entered: Tensor, left: Tensor) -> bool:
    if entered.dim() < 3:
        return False
    first = left[:, 0]  # in a random direction: the sum over a normalised vector has no gradient
    direction = torch.randn(first.shape[-1], generator=torch.Generator().manual_seed(0)).to(first)
    (gradient,) = torch.autograd.grad((first @ direction).sum(), entered, retain_graph=True, allow_unused=True)
    return gradient is not None and bool(gradient[:, -1].any())
