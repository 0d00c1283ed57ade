"""Curvature per site from calibration batches: second moments of inputs and output gradients, accumulated in a stream.

The weights of sites are frozen while this runs, so a backward pass computes activation gradients only. A row counts if its
gradient is not zero, so padding and positions that the objective never reads drop out without a mask.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hpr.anatomy.lookup import module_at, slice_at
from hpr.anatomy.model import Anatomy, Site
from hpr.errors import HprError
from hpr.profiling.first_pass import reading
from hpr.profiling.layout import turned_modules
from hpr.profiling.objectives import Objective
from hpr.profiling.other_parameters import Sensitivity
from hpr.profiling.profile import SiteStatistics, pooled, trace, unit
from hpr.profiling.weight_reads import Record, WeightsRead, experts_one_by_one, with_graph
from hpr.runtime.batch import Batch, BatchLike, as_batches, examples_in, has_positions_first
from hpr.runtime.hooks import _frozen, forget_computed, run, uncached
from hpr.runtime.progress import progress
from hpr.runtime.torch_errors import does_not_fit

DIAGONAL_ABOVE = 8192
_SIZES = ("gradients", "inputs", "changes")  # traces that bring the parts of a sum to one scale
_LEAST = torch.finfo(torch.float32).tiny  # of a trace whose inverse float32 can hold
_FLUSH = 8  # batches added up in float32 before they go into float64


def memory_needed(anatomy: Anatomy) -> int:
    """Return the bytes that the sums of all sites need, in float64."""
    linears = sum(_entries(site.out_features) + _entries(site.in_features) for site in anatomy.sites if site.kind == "linear")
    tables = sum(site.out_features + _entries(site.in_features) for site in anatomy.sites if site.kind == "embedding")
    return 8 * (linears + tables)


def measure_curvature(
    model: nn.Module,
    anatomy: Anatomy,
    batches: Sequence[BatchLike],
    objective: Objective,
    seed: int = 0,
    others: Sensitivity | None = None,
) -> tuple[dict[str, SiteStatistics], int]:
    """Return the statistics of every site over the batches, and the number of examples; ``others`` takes those of the rest.

    Two first passes read a sixteenth of the batches. The first measures the mean inputs that centre the moments; the second
    measures the traces of the two estimates that are averaged. The third pass reads all batches. Raises ``HprError`` for no
    batches, and for a loss that is not finite (the message names the batch).
    """
    if not batches:
        raise HprError("no calibration batches: give at least one")
    generator = torch.Generator().manual_seed(seed)
    batches = as_batches(batches)
    few = first_few(batches)
    turned = turned_modules(model, batches)
    total = 2 * len(few) + len(batches)
    moments = {site.name: _Moments(site) for site in anatomy.sites}
    done = 0
    with _frozen(model), uncached(model):  # a cache is written in place, which a backward pass cannot undo
        for stage, part in enumerate((few, few, batches)):
            if stage:
                moments = {name: earlier.next(stage) for name, earlier in moments.items()}
            last = others if stage == 2 else None
            with last.measured() if last else nullcontext():
                for index, batch in enumerate(part):
                    forget_computed(model)  # a graph can be run backwards once
                    with _hooks(model, anatomy, moments, batch, turned):
                        with reading(model, batch, index):
                            outputs = run(model, batch)
                        loss = objective.loss(outputs, batch, generator)
                        if not torch.isfinite(loss):
                            raise HprError(
                                f"the loss of calibration batch {index} is {loss.item()}: remove non-finite inputs from it"
                            )
                        _differentiate(loss, model, index)
                    if last:
                        last.add()
                    done += 1
                    progress("curvature", done, total)
    examples = sum(examples_in(batch) for batch in batches)
    return {name: moment.finish(examples) for name, moment in moments.items()}, examples


def _differentiate(loss: Tensor, model: nn.Module, index: int) -> None:
    """Run the backward pass. Raise ``HprError`` if the model cannot be differentiated, by an operation of its own."""
    if not loss.requires_grad:
        return  # nothing in this batch depends on a weight
    try:
        loss.backward()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # an assertion is the model's own
        if isinstance(error, RuntimeError) and not does_not_fit(error):
            raise
        raise HprError(
            f"the backward pass of {type(model).__name__} fails on calibration batch {index} ({error}): load the "
            f"model with attn_implementation='eager', or with other settings that it can be trained with"
        ) from error


def first_few(batches: Sequence[Batch]) -> Sequence[Batch]:
    """Return the first sixteenth of the batches, at least one."""
    return batches[: max(1, len(batches) // 16)]


def _entries(side: int) -> int:
    return side if side > DIAGONAL_ABOVE else side * side


@dataclass
class _Moments:
    """Running sums for one site, float64. Tied modules add to the same sums; a tied head has sums of its own.

    Two estimates of one Fisher matrix are averaged: rows taken as independent (K-FAC, inputs weighted by their gradient), and
    whole examples (Shampoo, Gupta et al. 2018), which sees how rows add up. For a Linear with rows g, x of an example and
    dW = Σ g xᵀ, ``left`` is the sum of Σ g gᵀ and Σ dW dWᵀ, ``right`` of Σ ‖g‖² x xᵀ and Σ dWᵀ dW, each part divided by
    its trace as first seen, ``sizes``; without sizes only the traces and the mean input are collected. ``centre`` (in,) is
    taken off x where a bias can absorb it.

    The rows of an expert come from all examples in mixed order, so the sum over one example is unknown. For experts, only
    K-FAC's estimate is used, and ``changes`` is the trace for independent rows, Σ ‖g‖² ‖x‖².
    """

    site: Site
    centre: Tensor | None = None
    sizes: dict[str, float] | None = None
    sums: dict[str, Tensor] = field(default_factory=dict)
    rows: int = 0
    head: _Moments | None = None
    recent: dict[str, Tensor] = field(default_factory=dict)
    calls: int = 0

    def add(self, rows: int, **parts: Sequence[Tensor | tuple[Tensor, Tensor]]) -> None:
        """Add vectors, and firstᵀ second of pairs of (rows, n), in float32; into float64 every few calls.

        Every such sum is symmetric, so a matrix gets its upper triangle alone.
        """
        self.rows += rows
        self.calls += 1
        for name, several in parts.items():
            for part in several:
                if isinstance(part, Tensor) or part[0].shape[1] > DIAGONAL_ABOVE:
                    vector = part if isinstance(part, Tensor) else (part[0] * part[1]).sum(0)
                    self.recent[name] = self.recent[name] + vector if name in self.recent else vector
                else:
                    if name not in self.recent:
                        self.recent[name] = part[0].new_zeros(part[0].shape[1], part[0].shape[1])
                    _add_upper(self.recent[name], *part)
        if self.calls % _FLUSH == 0:
            self._flush()

    def _flush(self) -> None:
        for name, part in self.recent.items():
            self.sums[name] = self.sums[name].add_(part) if name in self.sums else part.double()
        self.recent = {}

    def next(self, stage: int) -> _Moments:
        """Return empty sums for the next stage. They take over the mean input of this stage, or its traces as ``sizes``."""
        self._flush()
        head = self.head.next(stage) if self.head is not None else None
        if stage == 1:
            centred = self.site.has_bias and "mean" in self.sums
            return _Moments(self.site, (self.sums["mean"] / self.rows).float() if centred else None, head=head)
        seen = {name: float(self.sums[name]) if name in self.sums else 0.0 for name in _SIZES}
        sizes = {name: size if size > _LEAST else 1.0 for name, size in seen.items()}
        return _Moments(self.site, self.centre, sizes, head=head)

    def finish(self, examples: int) -> SiteStatistics:
        if self.head is not None and self.head.rows:
            return _combined(self._without_head(examples), self.head.finish(examples))
        return self._without_head(examples)

    def _without_head(self, examples: int) -> SiteStatistics:
        self._flush()
        sums = {name: _mirrored(part.cpu()) for name, part in self.sums.items()}
        if not self.rows or not sums or not float(trace(sums["left"])):
            return self._without_gradient()
        if not all(torch.isfinite(part).all() for part in sums.values()):
            raise HprError(f"{self.site.name}: its activations or gradients are not finite on the calibration data")
        rows = self.rows / examples
        if "counts" in sums:
            return SiteStatistics(sums["counts"] / self.rows, sums["left"] / self.rows, rows)
        fisher = float(sums["changes"]) / examples  # the trace of the Fisher matrix is exact
        if not (fisher > 0 and trace(sums["right"]) > 0):  # inputs that never vary: the bias takes up any change
            return self._without_gradient()
        left = unit(sums["left"]) * (fisher / rows)
        return SiteStatistics(left, unit(sums["right"]), rows, sums["mean"] / self.rows if self.centre is not None else None)

    def _without_gradient(self) -> SiteStatistics:
        left, right = torch.zeros(self.site.out_features), torch.zeros(self.site.in_features)
        return SiteStatistics(left.double(), right.double(), 0.0)


def _combined(table: SiteStatistics, head: SiteStatistics) -> SiteStatistics:
    """Return one Kronecker product for a matrix that is embedding and output head, weighted by the Fisher trace of each use."""
    if head.left.dim() == 2:  # a small vocabulary: the frequencies are a diagonal, so only the head's diagonal counts
        head = replace(head, left=head.left.diagonal().clone())
    if not (table.has_gradient and head.has_gradient):
        return head if head.has_gradient else table
    traces = [part.fisher_trace for part in (table, head)]
    left, right = pooled((table, head), traces)
    return SiteStatistics(left, right, sum(traces))


@contextmanager
def _hooks(
    model: nn.Module, anatomy: Anatomy, moments: dict[str, _Moments], batch: Batch, turned: Collection[nn.Module]
) -> Iterator[None]:
    handles = []
    tables: dict[int, Record] = {}
    experts: dict[int, Record] = {}
    for site in anatomy.sites:
        if site.expert is not None:
            expert = slice_at(model, site.name)
            assert expert is not None
            experts[expert.weight.data_ptr()] = partial(_add_expert, moments[site.name])
            continue
        for path in (site.name, *site.aliases):
            module = module_at(model, path)
            target = moments[site.name]
            if isinstance(module, nn.Embedding):
                tables[id(module.weight)] = partial(_add_embedding, target)
                continue
            if site.kind == "embedding":  # a tied head is another use
                target.head = target.head or _Moments(site)
                target = target.head
            handles.append(module.register_forward_hook(_recorder(target, batch, module in turned)))
    try:
        with experts_one_by_one(model), WeightsRead(tables, experts):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _recorder(target: _Moments, batch: Batch, turned: bool) -> Callable:
    def record(module: nn.Module, inputs: tuple, output: Any) -> Any:
        if not torch.is_grad_enabled():  # some models run a part of their blocks without gradients
            return output
        x = inputs[0].detach()
        first = has_positions_first(x, batch, turned)
        output = with_graph(output)
        output.register_hook(lambda gradient: _add_linear(target, _by_example(x, first), _by_example(gradient, first)))
        return output

    return record


def _add_upper(total: Tensor, first: Tensor, second: Tensor) -> None:
    """Add firstᵀ second to the upper triangle of ``total``, in bands of rows. This saves a quarter to a third of the work."""
    width = len(total)
    band = max(192, width // 8)
    for start in range(0, width, band):
        total[start : start + band, start:].addmm_(first[:, start : start + band].T, second[:, start:])


def _mirrored(total: Tensor) -> Tensor:
    return total if total.dim() < 2 else total.triu() + total.triu(1).T


def _add_linear(target: _Moments, x: Tensor, g: Tensor) -> None:
    """Add the rows of one call. B: examples, T: rows of one example, O: out, I: in."""
    flat_g, flat_x = g.flatten(0, 1), x.flatten(0, 1)
    weight = flat_g.square().sum(1)
    reached = _has_gradient(weight)
    if not (rows := int(reached.sum())):
        return
    mean = flat_x[reached].sum(0)
    if target.centre is not None:
        x = x - target.centre
        flat_x = x.flatten(0, 1)
    if formed := _worth_forming(g, x):  # Σ dW dWᵀ and its trace, whichever way is cheaper
        change = g.transpose(1, 2) @ x  # [B, O, I]
        changes = change.square().sum()
    else:
        alike_x, alike_g = x @ x.transpose(1, 2), g @ g.transpose(1, 2)  # [B, T, T]
        changes = (alike_x * alike_g).sum()
    if target.sizes is None:
        inputs = weight @ flat_x.square().sum(1)
        target.add(rows, mean=[mean], gradients=[weight.sum()], inputs=[inputs], changes=[changes])
        return
    if formed:
        sideways, upright = change.transpose(1, 2).flatten(0, 1), change.flatten(0, 1)
        outer, inner = (sideways, sideways), (upright, upright)
    else:
        outer, inner = (flat_g, (alike_x @ g).flatten(0, 1)), (flat_x, (alike_g @ x).flatten(0, 1))
    by_rows, by_inputs, by_examples = (1 / target.sizes[name] for name in _SIZES)
    target.add(
        rows,
        mean=[mean],
        changes=[changes],
        left=_merged(flat_g, by_rows * flat_g, outer, by_examples),
        right=_merged(flat_x, (by_inputs * weight)[:, None] * flat_x, inner, by_examples),
    )


def _has_gradient(squares: Tensor) -> Tensor:
    """Return which rows have a gradient, from squared norms: those above the rounding error of the largest."""
    return squares > torch.finfo(torch.float32).eps ** 2 * (squares.max() if len(squares) else 0)


def _worth_forming(g: Tensor, x: Tensor) -> bool:
    """Return whether dW (out, in) per example costs less than products of all pairs of rows: long texts, narrow sites."""
    length, rows, columns = g.shape[1], g.shape[2], x.shape[2]
    across = length * (rows * rows + columns * columns) + 2 * length * length * (rows + columns)
    return across > rows * columns * (length + rows + columns)


def _merged(
    first: Tensor, weighted: Tensor, other: tuple[Tensor, Tensor], share: float
) -> list[Tensor | tuple[Tensor, Tensor]]:
    """Return pairs whose products sum to firstᵀ weighted + share · otherᵀ other: one pair if the first factors are equal."""
    if other[0] is first:
        return [(first, weighted.add(other[1], alpha=share))]
    return [(first, weighted), (other[0], other[1] * share)]


def _add_embedding(target: _Moments, ids: Tensor, gradient: Tensor) -> None:
    gradient = gradient.detach().reshape(-1, gradient.shape[-1]).float()
    ids = ids.reshape(-1)
    reached = _has_gradient(gradient.square().sum(1))
    if target.sizes is not None and (rows := int(reached.sum())):
        counts = torch.bincount(ids[reached], minlength=target.site.out_features)
        target.add(rows, counts=[counts], left=[(gradient, gradient)])


def _add_expert(target: _Moments, x: Tensor, gradient: Tensor) -> None:
    g, x = gradient.detach().reshape(-1, gradient.shape[-1]).float(), x.reshape(-1, x.shape[-1]).float()
    weight = g.square().sum(1)
    if target.sizes is not None and (rows := int(_has_gradient(weight).sum())):
        weighted = weight[:, None] * x
        target.add(rows, changes=[(weighted * x).sum()], left=[(g, g)], right=[(weighted, x)])


def _by_example(rows: Tensor, positions_first: bool) -> Tensor:
    """Reshape (B, …, d), or (T, B, d), to (B, T, d) in float32. In (B, d), each example has one row; (d,) is one row."""
    rows = torch.atleast_2d(rows.detach().float())
    return rows.transpose(0, 1) if positions_first else rows.reshape(len(rows), -1, rows.shape[-1])
