"""Add routers to a plan, so that weights depend on the input.

W_s(x) = Σ_k α_k(x) · B_k. An expert B_k is a part of the rank components of the static plan, so only the router adds
parameters. Layers that share a basis share its experts. A router of zeros gives exactly the static model; healing trains it
(``healing.loss.Weights.routing``). Ouroboros (arXiv 2604.02051) routed whole matrices, and found a lower training loss but no
gain on held-out data. Compare a routed plan with a static plan of equal size before you use it.
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
from hpr.profiling.layout import turned_in
from hpr.runtime.batch import example_batch
from hpr.runtime.hooks import captured_hidden_states, entering, eval_mode, run

View = Literal["token", "sequence"]  # the part of the input that a router reads
_TRIES = 20  # attempts to lower the static plan's budget until the routers fit


def routed(
    plan: Plan,
    model: nn.Module,
    experts: int = 4,
    per: View | Literal["auto"] = "auto",
    only: str | None = None,
) -> Plan:
    """The plan with a router at every Linear site of a stack that has a term of rank ``experts`` or more.

    ``per``: a router reads each token, or the mean of its sequence. By default it reads the sequence in stacks whose positions
    attend to all others, and the token in causal stacks. ``only``: a pattern that limits the sites. Sites that take states with
    positions before examples get none. The routers' parameters count, so the plan may exceed its budget (see ``best_routed``).
    Raises ``HprError`` if no site can be routed.
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
    """The best plan with routers within a budget. The function lowers the budget of the static plan until the routers fit.

    ``gains``: site → share of the site's damage that a router would save (see ``hpr.routing.expected_gains``). If given, a
    router is added only to sites where it saves more damage than its parameters would save elsewhere; this may be no site, and
    the plan is then static. Raises ``HprError`` if no plan with routers fits the budget.
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
    """Names of the sites where a router saves more nats than its parameters cost, at the plan's nats per parameter."""
    plan, price = proposal.plan, proposal.multiplier
    cost = {name: price * experts * (anatomy[name].in_features + 1) for name in gains}
    return {name for name, gain in gains.items() if gain * plan.entries[name].damage > cost[name]}


def _routes(
    model: nn.Module, anatomy: Anatomy, experts: int, per: View | Literal["auto"], only: str | None
) -> dict[str, Route]:
    """Site → its route, for every Linear site of a stack that the pattern ``only`` selects."""
    bidirectional = seeing_all(model, anatomy) if per == "auto" else set()
    turned = _turned(model)
    routes = {}
    for site in anatomy.select(only):
        if (
            site.kind == "linear"
            and site.expert is None
            and site.stack is not None
            and module_at(model, site.name) not in turned
        ):
            view: View = "sequence" if site.stack in bidirectional else "token"
            routes[site.name] = Route(f"{site.name}.router", experts, view if per == "auto" else per)
    if turned and not routes:
        raise HprError(
            f"the hidden states of {type(model).__name__} have positions before examples, and routers read states with "
            f"examples first: leave the plan without routers"
        )
    return routes


def _turned(model: nn.Module) -> frozenset[nn.Module]:
    """The modules that take states with positions first; none if the model does not say what it reads."""
    try:
        return turned_in(model, example_batch(model))
    except HprError:
        return frozenset()


def _with_routes(plan: Plan, routes: Mapping[str, Route], experts: int) -> Plan:
    """The plan with routes at the terms of rank ``experts`` or more. Raises ``HprError`` if there is none."""
    entries = dict(plan.entries)
    for name, route in routes.items():
        terms = [replace(term, route=route) if (term.rank or 0) >= experts else term for term in entries[name].terms]
        entries[name] = replace(entries[name], terms=tuple(terms))
    if entries == dict(plan.entries):
        raise HprError(f"no site of this plan has a term of rank {experts} or more to route: lower experts, or plan anew")
    return replace(plan, entries=entries)


def seeing_all(model: nn.Module, anatomy: Anatomy) -> set[str]:
    """Names of the stacks that are not causal: the output of the first position depends on the input of the last.

    The function computes gradients on ``example_batch``. It returns no stack if the model does not say what it reads.
    """
    try:
        batch = example_batch(model)
    except HprError:
        return set()
    inputs: dict[str, Tensor] = {}

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            x = entering(args, kwargs)
            inputs[name] = x if x.requires_grad else x.requires_grad_()

        return hook

    last = {stack.name: stack.blocks[-1] for stack in anatomy.stacks}
    handles = [
        module_at(model, stack.blocks[0]).register_forward_pre_hook(enter(stack.name), with_kwargs=True)
        for stack in anatomy.stacks
    ]
    try:
        with torch.enable_grad(), eval_mode(model), captured_hidden_states(model, list(last.values())) as outputs:
            run(model, batch)
        return {name for name, path in last.items() if path in outputs and _sees_last(inputs[name], outputs[path])}
    finally:
        for handle in handles:
            handle.remove()


def _sees_last(inputs: Tensor, outputs: Tensor) -> bool:
    """Whether the output of the first position depends on the input of the last; both (batch, positions, d)."""
    if inputs.dim() < 3:
        return False
    first = outputs[:, 0]  # read in a random direction, because the sum of a normalised vector has no gradient
    direction = torch.randn(first.shape[-1], generator=torch.Generator().manual_seed(0)).to(first)
    (gradient,) = torch.autograd.grad((first @ direction).sum(), inputs, retain_graph=True, allow_unused=True)
    return gradient is not None and bool(gradient[:, -1].any())
