"""Refit private factors and biases to the inputs that they receive from the compressed layers below.

Teacher and student run side by side on cached hidden states, layer by layer. The new target of a site is the regression of
the output it should have on the input it now receives, ``C Â⁻¹`` with C = cov(target, x̂). If its output is added to the
residual stream, the target also corrects the error that is there already. Subspaces are chosen in the metric of the plan
with Â instead of A. GPTQ and SVD-LLM also correct for accumulated error; the residual term is that of QEP (Arai & Ichikawa
2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hpr.anatomy.lookup import module_at
from hpr.anatomy.model import Anatomy, Site, Stack
from hpr.errors import PlanError
from hpr.nn.bank import FactorBank, bank_of
from hpr.nn.linear import SharedLinear
from hpr.operators.fitting import Fits, groups, product
from hpr.operators.identity_block import store
from hpr.operators.low_rank import truncate
from hpr.operators.metric import Measured
from hpr.operators.registry import OPERATORS
from hpr.operators.shared_basis import best_private
from hpr.plans.owners import owners
from hpr.plans.plan import Plan
from hpr.profiling.layout import turned_modules
from hpr.profiling.profile import Profile
from hpr.runtime.batch import Batch, BatchLike
from hpr.runtime.hooks import eval_mode, to_device_of
from hpr.runtime.progress import progress
from hpr.sharing.layerwise import Layer, ModelPair, RegressionSums, observe, record_calls, stages


def refit_stacks(
    student: nn.Module,
    teacher: nn.Module,
    anatomy: Anatomy,
    plan: Plan,
    measured: dict[str, Measured],
    batches: Sequence[Batch],
) -> None:
    """Refit every compressed Linear inside the stacks, in place; kept sites, experts, embeddings and heads stay as they are.

    Both models run in evaluation mode. If factors are shared, a second sweep follows: low-rank ones are first solved again
    over all their users, for the targets of the first sweep. Raises ``PlanError`` if layers are dropped or reuse attention,
    because these cannot be run one by one.
    """
    if plan.layers:
        name, state = next(iter(plan.layers.items()))
        raise PlanError(f"layer {name} is {state!r}, so layers cannot be refitted one by one: leave the refit out (--no-refit)")
    bank = bank_of(student)
    if bank is None:
        return
    sweeps = 2 if any(len(names) > 1 for _, names in groups(plan)) else 1
    work = _Refit(student, teacher, bank, plan, measured, sweeps * sum(stack.layers for stack in anatomy.stacks))
    with torch.no_grad(), eval_mode(student), eval_mode(teacher):
        for sweep in range(sweeps):
            targets: dict[str, Measured] = {}
            for stack in anatomy.stacks:
                targets |= work.refit_stack(stack, [site for site in anatomy.sites if site.stack == stack.name], batches)
            if sweep + 1 < sweeps:
                _resolve_shared(bank, plan, targets)


@dataclass
class _Refit:
    """The two models of a refit, its plan and how many of all ``layers`` are ``done``."""

    student: nn.Module
    teacher: nn.Module
    bank: FactorBank
    plan: Plan
    measured: dict[str, Measured]
    layers: int
    done: int = 0

    def refit_stack(self, stack: Stack, sites: Sequence[Site], batches: Sequence[Batch]) -> dict[str, Measured]:
        """Refit the sites of a stack from the lowest layer up. Returns the target of each, by the name of its site."""
        targets: dict[str, Measured] = {}
        turned = turned_modules(self.teacher, batches)
        pairs = [
            ModelPair(record_calls(self.teacher, stack, batch), record_calls(self.student, stack, batch), batch, turned)
            for batch in batches
        ]
        chosen = [site for site in sites if self.plan.entries[site.name].terms and site.name in self.measured]
        chosen = [site for site in chosen if site.expert is None]  # the two models may route a row differently
        for number in range(stack.layers):
            blocks = [module_at(model, stack.block(number)) for model in (self.teacher, self.student)]
            layer = Layer(stack, number, *blocks)
            for stage in stages(layer, [site for site in chosen if site.layer == number], pairs[0]):
                for site, sums in observe(layer, stage, pairs).items():
                    if not sums.rows:  # every position of these batches is padding
                        continue
                    module = module_at(self.student, site.name)
                    assert isinstance(module, SharedLinear)
                    targets[site.name] = sums.target(self.measured[site.name])
                    _refit_site(module, self.bank, self.plan, targets[site.name], sums)
            for pair in pairs:
                pair.advance(layer)
            self.done += 1
            progress("refit", self.done, self.layers)
        return targets


def _refit_site(module: SharedLinear, bank: FactorBank, plan: Plan, target: Measured, sums: RegressionSums) -> None:
    """New private factors for one site, then its bias."""
    terms = plan.entries[target.site.name].terms
    values = {name: bank[name].dense().detach().double() for term in terms for name in term.factors}
    users = owners({name: entry.terms for name, entry in plan.entries.items()})
    own = terms[-1]
    if own.v is not None and own.rank is not None:
        others = product(terms[:-1], values, target.site) if len(terms) > 1 else 0.0
        rest = Measured(target.site, target.weight - others, target.left, target.right, target.rows)
        if len(users[own.u]) == len(users[own.v]) == 1:
            values[own.u], values[own.v] = truncate(rest, own.rank)
            _put(bank, store({own.u: values[own.u], own.v: values[own.v]}, [own]))
        elif len(users[own.u]) == 1:
            values[own.u] = best_private(rest, values[own.v])
            _put(bank, {own.u: values[own.u]})
        elif len(users[own.v]) == 1:
            values[own.v] = best_private(rest.transposed, values[own.u].T).T
            _put(bank, {own.v: values[own.v]})
    if module.bias is not None:
        weight = product(terms, values, target.site)
        module.bias.copy_(sums.t / sums.rows - weight @ (sums.x / sums.rows))


def _resolve_shared(bank: FactorBank, plan: Plan, targets: dict[str, Measured]) -> None:
    for operator, names in groups(plan):
        low_rank = all(term.v is not None for name in names for term in plan.entries[name].terms)
        if (
            len(names) > 1 and low_rank and all(name in targets for name in names)
        ):  # a full matrix would follow its data too closely
            terms = {name: plan.entries[name].terms for name in names}
            values = OPERATORS[operator].fit([targets[name] for name in names], terms)
            _put(bank, store(values, [term for name in names for term in terms[name]]))


def _put(bank: FactorBank, values: dict[str, Tensor]) -> None:
    for name, value in values.items():
        if name.endswith(".order"):
            bank[name.removesuffix(".order")].order.copy_(value)
        else:
            bank[name].weight.copy_(value)


def refit(
    student: nn.Module,
    teacher: nn.Module,
    plan: Plan,
    profile: Profile,
    batches: Sequence[BatchLike],
    *,
    fits: Fits | None = None,
) -> None:
    """Fit private factors and biases again, in place, to what the compressed layers below emit.


    It helps on data like those that the model will see, and can hurt on others: the regression follows its data closely.
    Both models run in evaluation mode; the mode of each module is restored.
    ``fits``: the fits of the teacher, if it was measured before.
    """
    fits = Fits(teacher, profile) if fits is None else fits
    fits.check(teacher, profile)
    aligned = fits.aligned(plan.alignment)  # the student's insides are those of the aligned model
    measured = aligned.measured(name for name, entry in plan.entries.items() if entry.terms)
    moved = [to_device_of(batch, teacher) for batch in batches]
    refit_stacks(student, aligned.model, aligned.anatomy, plan, measured, moved)
