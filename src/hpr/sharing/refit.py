"""Refit: private factors and biases, fitted anew to what the compressed layers below really emit.

Layer by layer, teacher and student run side by side on cached hidden states. A site's new target is the regression of what
it should give on what it now receives, ``C Â⁻¹`` with C = cov(target, x̂); where its output is added to the residual stream,
the target also makes up for the error already there. Subspaces are chosen in the metric of the plan with Â for A. GPTQ and
SVD-LLM correct for accumulated error in a like way; the residual term is that of QEP (Arai & Ichikawa 2025).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hpr.anatomy.lookup import module_at
from hpr.anatomy.model import Anatomy, Site, Stack
from hpr.errors import HprError
from hpr.nn.bank import FactorBank, bank_of
from hpr.nn.linear import SharedLinear
from hpr.operators.fitting import Fits, groups, product
from hpr.operators.identity_block import store
from hpr.operators.low_rank import truncate
from hpr.operators.metric import Measured, Side
from hpr.operators.registry import OPERATORS
from hpr.operators.shared_basis import best_private
from hpr.plans.owners import owners
from hpr.plans.plan import Plan
from hpr.profiling.layer_features import real_positions
from hpr.profiling.profile import Profile
from hpr.runtime.batch import Batch, BatchLike, mask_of
from hpr.runtime.hooks import run, to_device_of
from hpr.runtime.progress import progress

RIDGE = 1e-3  # pulls the regression towards the original weight, as a share of the inputs' mean variance


def refit_stacks(
    student: nn.Module,
    teacher: nn.Module,
    anatomy: Anatomy,
    plan: Plan,
    measured: dict[str, Measured],
    batches: Sequence[Batch],
) -> None:
    """Refit every compressed Linear inside the stacks, in place; kept sites, experts, embeddings and heads stay as they are.

    A second sweep follows where factors are shared: low-rank ones are first re-solved over all their users, on the first
    sweep's targets. Raises ``HprError`` where layers are dropped or reuse what others compute: one by one they cannot run.
    """
    if plan.layers:
        name, state = next(iter(plan.layers.items()))
        raise HprError(f"layer {name} is {state!r}, so layers cannot be refitted one by one: leave the refit out (--no-refit)")
    bank = bank_of(student)
    if bank is None:
        return
    shared = [names for _, names in groups(plan) if len(names) > 1]
    sweeps = 2 if shared else 1
    total = sweeps * sum(stack.layers for stack in anatomy.stacks)
    done = 0
    with torch.no_grad():
        for sweep in range(sweeps):
            targets: dict[str, Measured] = {}
            for stack in anatomy.stacks:
                hidden = [_Pair(_enter(teacher, stack, batch), _enter(student, stack, batch), batch) for batch in batches]
                for layer in range(stack.layers):
                    blocks = [module_at(model, stack.block(layer)) for model in (teacher, student)]
                    sites = [site for site in anatomy.sites if site.stack == stack.name and site.layer == layer]
                    sites = [site for site in sites if plan.entries[site.name].terms and site.name in measured]
                    sites = [site for site in sites if site.expert is None]  # the two models may route a row differently
                    for stage in _stages(blocks[0], stack, layer, sites, hidden[0]):
                        for site, sums in _observe(blocks, stack, layer, stage, hidden).items():
                            site_student = module_at(student, site.name)
                            assert isinstance(site_student, SharedLinear)
                            targets[site.name] = sums.target(measured[site.name])
                            _refit_site(site_student, bank, plan, targets[site.name], sums)
                    for pair in hidden:
                        pair.advance(blocks, layer)
                    done += 1
                    progress("refit", done, total)
            if sweep + 1 < sweeps:
                _resolve_shared(bank, plan, targets)


@dataclass
class _Sums:
    """Sums for one site over all rows: inputs x̂ (in,), targets t (out,), their products."""

    rows: float = 0.0
    x: Any = 0.0
    t: Any = 0.0
    xx: Any = 0.0
    tx: Any = 0.0

    def add(self, x: Tensor, t: Tensor) -> None:
        self.rows += len(x)
        self.x = self.x + x.sum(0).double()
        self.t = self.t + t.sum(0).double()
        self.xx = self.xx + (x.T @ x).double()
        self.tx = self.tx + (t.T @ x).double()

    def target(self, one: Measured) -> Measured:
        """The site with its regression target for a weight and the moment of its new inputs."""
        x, t = self.x / self.rows, self.t / self.rows
        centred = one.mean is not None
        inputs = self.xx / self.rows - (torch.outer(x, x) if centred else 0)
        cross = self.tx / self.rows - (torch.outer(t, x) if centred else 0)
        ridge = RIDGE * float(inputs.diagonal().mean())
        weight = torch.linalg.solve(inputs + ridge * torch.eye(len(inputs)).to(inputs), (cross + ridge * one.weight).T).T
        return Measured(one.site, weight, one.left, Side(inputs), one.rows, one.mean)


@dataclass
class _Entry:
    """How a block was called: its hidden state and all other arguments, layer by layer."""

    hidden: Tensor
    calls: list[tuple[tuple, dict[str, Any]]] = field(default_factory=list)

    def run(self, block: nn.Module, layer: int) -> Tensor:
        positional, named = self.calls[layer]
        if positional:
            output = block(self.hidden, *positional[1:], **named)
        else:
            output = block(**{**named, "hidden_states": self.hidden})
        return output if isinstance(output, Tensor) else output[0]


@dataclass
class _Pair:
    teacher: _Entry
    student: _Entry
    batch: Batch

    def advance(self, blocks: Sequence[nn.Module], layer: int) -> None:
        self.teacher.hidden = self.teacher.run(blocks[0], layer)
        self.student.hidden = self.student.run(blocks[1], layer)


def _enter(model: nn.Module, stack: Stack, batch: Batch) -> _Entry:
    """Run a model once and note how each block of a stack is called."""
    calls: list[tuple[tuple, dict[str, Any]]] = []
    first: list[Tensor] = []

    def note(module: nn.Module, positional: tuple, named: dict[str, Any]) -> None:
        hidden = positional[0] if positional else named["hidden_states"]
        if not first:
            first.append(hidden.detach())
        slim = {name: value for name, value in named.items() if name != "hidden_states"}
        if "past_key_values" in slim:
            slim["past_key_values"] = None  # a cache would remember this call in the next
        calls.append(((None, *positional[1:]) if positional else (), slim))

    handles = [module_at(model, path).register_forward_pre_hook(note, with_kwargs=True) for path in stack.blocks]
    try:
        run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return _Entry(first[0], calls)


def _stages(block: nn.Module, stack: Stack, layer: int, sites: Sequence[Site], pair: _Pair) -> Iterator[list[Site]]:
    """Sites in the order they are called; those that read the same tensor (query, key, value) together."""
    order: list[tuple[Tensor, Site]] = []  # inputs are held, so that none comes to lie where another was

    def note(site: Site) -> Callable:
        return lambda module, inputs: order.append((inputs[0], site))

    handles = [block.get_submodule(_within(site, stack, layer)).register_forward_pre_hook(note(site)) for site in sites]
    try:
        pair.teacher.run(block, layer)
    finally:
        for handle in handles:
            handle.remove()
    stage: list[Site] = []
    last = None
    for x, site in order:
        if stage and x.data_ptr() != last:
            yield stage
            stage = []
        stage.append(site)
        last = x.data_ptr()
    if stage:
        yield stage


def _observe(
    blocks: Sequence[nn.Module], stack: Stack, layer: int, stage: Sequence[Site], hidden: Sequence[_Pair]
) -> dict[Site, _Sums]:
    sums: dict[Site, _Sums] = {}
    for pair in hidden:
        with (
            _watching(blocks[0], stack, layer, stage) as seen_teacher,
            _watching(blocks[1], stack, layer, stage) as seen_student,
        ):
            outputs = [entry.run(block, layer) for entry, block in zip((pair.teacher, pair.student), blocks, strict=True)]
        for site in stage:
            teacher, student = seen_teacher[site], seen_student[site]
            for seen, output in ((teacher, outputs[0]), (student, outputs[1])):
                seen.later.append(output)
            place = teacher.residual_place()
            found = sums.setdefault(site, _Sums())
            t = teacher.output
            if place is not None:
                t = teacher.later[place] - (student.later[place] - student.output)
            rows = _real(pair.batch, stack, student.input)
            found.add(student.input[rows].flatten(0, -2).float(), t[rows].flatten(0, -2).float())
    return sums


def _real(batch: Batch, stack: Stack, x: Tensor) -> Tensor | slice:
    """Rows of a site's input that are no padding. In a decoder they are its own positions, or those of the encoder."""
    if x.dim() != 3:
        return slice(None)
    return (mask_of(batch, x) * real_positions(batch, stack, x)).bool()


@dataclass
class _Seen:
    """What one call of a block shows of a site: its input and output, what was there before, what norms read after."""

    earlier: list[Tensor]
    input: Tensor = field(default_factory=lambda: torch.empty(0))
    output: Tensor = field(default_factory=lambda: torch.empty(0))
    later: list[Tensor] = field(default_factory=list)

    def residual_place(self) -> int | None:
        """Which later tensor is this output plus an earlier one: the residual stream; None where there is none."""
        for place, total in enumerate(self.later):
            if total.shape != self.output.shape:
                continue
            rest = total - self.output
            scale = float(total.abs().max())
            for known in self.earlier:
                if known.shape == rest.shape and float((rest - known).abs().max()) <= 1e-4 * scale:
                    return place
        return None


@contextmanager
def _watching(block: nn.Module, stack: Stack, layer: int, stage: Sequence[Site]) -> Iterator[dict[Site, _Seen]]:
    """Record the stage's sites, the block's input, and what its norms (modules with one-dimensional weights) read and give."""
    stream: list[Tensor] = []
    seen: dict[Site, _Seen] = {}

    def enter(module: nn.Module, positional: tuple, named: dict[str, Any]) -> None:
        stream.append(positional[0] if positional else named["hidden_states"])

    def norm(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        for one in seen.values():
            one.later.append(inputs[0])
        stream.extend((inputs[0], output))

    def record(site: Site) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            seen[site] = _Seen(list(stream), inputs[0], output)

        return hook

    handles = [block.register_forward_pre_hook(enter, with_kwargs=True)]
    for module in block.modules():
        own = dict(module.named_parameters(recurse=False))
        if "weight" in own and own["weight"].dim() == 1:
            handles.append(module.register_forward_hook(norm))
    handles += [block.get_submodule(_within(site, stack, layer)).register_forward_hook(record(site)) for site in stage]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _within(site: Site, stack: Stack, layer: int) -> str:
    return site.name.removeprefix(f"{stack.block(layer)}.")


def _refit_site(module: SharedLinear, bank: FactorBank, plan: Plan, target: Measured, sums: _Sums) -> None:
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
        if len(names) > 1 and low_rank and all(name in targets for name in names):  # a full matrix follows its text too closely
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
    """Fit private factors and biases anew to what the compressed layers below emit, in place (see ``refitting``).

    It pays on data like that which the model will see, and can lose on other data: the regression follows its text closely.
    ``fits``: the fits of the teacher, if it was measured before.
    """
    fits = Fits(teacher, profile) if fits is None else fits
    fits.check(teacher, profile)
    aligned = fits.aligned(plan.alignment)  # the student's insides are those of the aligned model
    measured = aligned.measured(name for name, entry in plan.entries.items() if entry.terms)
    moved = [to_device_of(batch, teacher) for batch in batches]
    refit_stacks(student, aligned.model, aligned.anatomy, plan, measured, moved)
