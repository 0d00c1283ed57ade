"""Curvature per site from calibration batches: second moments of inputs and output gradients, accumulated in a stream.

All parameters are frozen while this runs, so a backward pass computes activation gradients only. A row is *live* where its
gradient is not zero; padding, and positions the objective never reads, drop out by themselves, without knowing the mask.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from hpr.anatomy import Anatomy, Site, module_at
from hpr.errors import HprError
from hpr.profiling.objectives import Batch, Objective, call, examples_in
from hpr.profiling.profile import SiteStatistics

DIAGONAL_ABOVE = 8192
_FLUSH = 8  # batches added up in float32 before they go into float64
Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """The progress callback that shows nothing."""


def memory_needed(anatomy: Anatomy) -> int:
    """Bytes that the sums of all sites take, known before the first batch (float64)."""
    linears = sum(_entries(site.out_features) + _entries(site.in_features) for site in anatomy.sites if site.kind == "linear")
    tables = sum(site.out_features + _entries(site.in_features) for site in anatomy.sites if site.kind == "embedding")
    return 8 * (2 * linears + tables)


def measure_curvature(
    model: nn.Module,
    anatomy: Anatomy,
    batches: Sequence[Batch],
    objective: Objective,
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[dict[str, SiteStatistics], int]:
    """Statistics of every site over the batches, and the number of examples.

    A first look at a sixteenth of the batches gives the mean inputs around which the moments are then taken. Raises
    ``HprError`` for no batches, and for a loss that is not finite (naming the batch).
    """
    if not batches:
        raise HprError("no calibration batches: at least one is needed")
    generator = torch.Generator().manual_seed(seed)
    first_look = {site.name: _Moments(site) for site in anatomy.sites}
    looked_at = max(1, len(batches) // 16)
    total = looked_at + len(batches)
    with _frozen(model):
        _run(
            model,
            anatomy,
            batches[:looked_at],
            objective,
            generator,
            first_look,
            lambda done: progress("curvature", done, total),
        )
        moments = {name: _Moments(seen.site, centre=seen.centre_found()) for name, seen in first_look.items()}
        for name, seen in first_look.items():
            if seen.head is not None:
                moments[name].head = _Moments(seen.site)
        _run(
            model, anatomy, batches, objective, generator, moments, lambda done: progress("curvature", looked_at + done, total)
        )
    examples = sum(examples_in(batch) for batch in batches)
    return {name: moment.finish(examples) for name, moment in moments.items()}, examples


def _run(
    model: nn.Module,
    anatomy: Anatomy,
    batches: Sequence[Batch],
    objective: Objective,
    generator: torch.Generator,
    moments: dict[str, _Moments],
    progress: Callable[[int], None],
) -> None:
    with _hooks(model, anatomy, moments):
        for index, batch in enumerate(batches):
            loss = objective.loss(call(model, batch), batch, generator)
            if not torch.isfinite(loss):
                raise HprError(f"the loss of calibration batch {index} is {loss.item()}: remove non-finite inputs from it")
            loss.backward()
            progress(index + 1)


def peak_memory() -> int:
    """The process's peak resident memory so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _entries(side: int) -> int:
    return side if side > DIAGONAL_ABOVE else side * side


@dataclass
class _Moments:
    """Running sums for one site, float64. Tied modules add to the same sums; a tied head has sums of its own.

    For a Linear, per example with rows g, x and dW = Σ g xᵀ: ``gradients`` Σ g gᵀ, ``inputs`` Σ ‖g‖² x xᵀ, and across rows
    ``outer`` Σ dW dWᵀ, ``inner`` Σ dWᵀ dW. ``centre`` (in,) is taken off x where a bias can absorb it.
    """

    site: Site
    centre: Tensor | None = None
    sums: dict[str, Tensor] = field(default_factory=dict)
    rows: int = 0
    head: _Moments | None = None
    recent: dict[str, Tensor] = field(default_factory=dict)
    calls: int = 0

    def add(self, rows: int, **parts: tuple[Tensor, ...]) -> None:
        """Add Σ first secondᵀ for pairs of (rows, n), or a vector, in float32; into float64 every few calls."""
        self.rows += rows
        self.calls += 1
        for name, part in parts.items():
            if len(part) == 1 or part[0].shape[1] > DIAGONAL_ABOVE:
                vector = part[0] if len(part) == 1 else (part[0] * part[1]).sum(0)
                self.recent[name] = self.recent[name] + vector if name in self.recent else vector
            elif name in self.recent:
                self.recent[name].addmm_(part[0].T, part[1])  # in place: the sums are as large as the weights
            else:
                self.recent[name] = part[0].T @ part[1]
        if self.calls % _FLUSH == 0:
            self._flush()

    def _flush(self) -> None:
        for name, part in self.recent.items():
            self.sums[name] = self.sums[name].add_(part) if name in self.sums else part.double()
        self.recent = {}

    def centre_found(self) -> Tensor | None:
        self._flush()
        return (self.sums["mean"] / self.rows).float() if self.site.has_bias and "mean" in self.sums else None

    def finish(self, examples: int) -> SiteStatistics:
        if self.head is not None and self.head.rows:
            return _combined(self._own(examples), self.head.finish(examples))
        return self._own(examples)

    def _own(self, examples: int) -> SiteStatistics:
        self._flush()
        sums = {name: part.cpu() for name, part in self.sums.items()}
        if not self.rows or not sums or not float(_trace(sums["gradients"])):
            return self._dead()
        if not all(torch.isfinite(part).all() for part in sums.values()):
            raise HprError(f"{self.site.name}: its activations or gradients are not finite on the calibration data")
        rows = self.rows / examples
        if "counts" in sums:
            return SiteStatistics(sums["counts"] / self.rows, sums["gradients"] / self.rows, rows)
        # Two estimates of one Fisher matrix, averaged: rows taken as independent (K-FAC, inputs weighted by their gradient),
        # and whole examples (Shampoo, Gupta et al. 2018), which sees how rows add up. The trace of the second is exact.
        trace = _trace(sums["outer"]) / examples
        if not (trace > 0 and _trace(sums["inputs"]) > 0):  # inputs that never vary: the bias takes up any change
            return self._dead()
        left = (_unit(sums["gradients"]) + _unit(sums["outer"])) * (trace / 2 / rows)
        right = (_unit(sums["inputs"]) + _unit(sums["inner"])) / 2
        return SiteStatistics(left, right, rows, sums["mean"] / self.rows if self.centre is not None else None)

    def _dead(self) -> SiteStatistics:
        left, right = torch.zeros(self.site.out_features), torch.zeros(self.site.in_features)
        return SiteStatistics(left.double(), right.double(), 0.0)


def _combined(table: SiteStatistics, head: SiteStatistics) -> SiteStatistics:
    """One Kronecker product for a matrix used both as embedding and as output head, weighted by each use's mass."""
    if head.left.dim() == 2:  # a small vocabulary: frequencies are a diagonal, so the head keeps its own
        head = replace(head, left=head.left.diagonal().clone())
    if not (table.live and head.live):
        return head if head.live else table
    masses = [part.rows * _trace(part.left) * _trace(part.right) for part in (table, head)]
    shares = [mass / sum(masses) for mass in masses]
    left, right = (
        torch.stack([share * _unit(getattr(part, side)) for share, part in zip(shares, (table, head), strict=True)]).sum(0)
        for side in ("left", "right")
    )
    return SiteStatistics(left, right, sum(masses))


def _unit(moment: Tensor) -> Tensor:
    return moment / _trace(moment)


def _trace(moment: Tensor) -> float:
    return float(moment.sum() if moment.dim() == 1 else moment.trace())


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without parameter gradients, everything restored afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = [(module, module.training) for module in model.modules()]
    model.requires_grad_(False)
    model.eval()
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, flag in training:
            module.training = flag


@contextmanager
def _hooks(model: nn.Module, anatomy: Anatomy, moments: dict[str, _Moments]) -> Iterator[None]:
    handles = []
    for site in anatomy.sites:
        for path in (site.path, *site.aliases):
            module = module_at(model, path)
            target = moments[site.name]
            if site.kind == "embedding" and not isinstance(module, nn.Embedding):  # a tied head is another use
                target.head = target.head or _Moments(site)
                target = target.head
            handles.append(module.register_forward_hook(_recorder(target)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _recorder(target: _Moments) -> Callable:
    def record(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        x = inputs[0].detach()
        if not output.requires_grad:
            output = output.detach().requires_grad_().clone()  # nothing below has a graph; cloned so that += stays legal
        if isinstance(module, nn.Embedding):
            output.register_hook(lambda gradient: _add_embedding(target, x, gradient))
        else:
            output.register_hook(lambda gradient: _add_linear(target, x, gradient))
        return output

    return record


def _add_linear(target: _Moments, x: Tensor, gradient: Tensor) -> None:
    g = _by_example(gradient.detach().float())  # B: examples, T: rows of one example, O: out, I: in
    x = _by_example(x.float())
    flat_g, flat_x = g.flatten(0, 1), x.flatten(0, 1)
    weight = flat_g.square().sum(1)
    live = weight > 0
    if not (rows := int(live.sum())):
        return
    mean = flat_x[live].sum(0)
    if target.centre is not None:
        x = x - target.centre
        flat_x = x.flatten(0, 1)
    across_x = (x @ x.transpose(1, 2)) @ g  # [B, T, O]; its product with g is Σ dW dWᵀ, dW itself is never formed
    across_g = (g @ g.transpose(1, 2)) @ x  # [B, T, I]
    target.add(
        rows,
        mean=(mean,),
        gradients=(flat_g, flat_g),
        inputs=(flat_x, flat_x * weight[:, None]),
        outer=(flat_g, across_x.flatten(0, 1)),
        inner=(flat_x, across_g.flatten(0, 1)),
    )


def _add_embedding(target: _Moments, ids: Tensor, gradient: Tensor) -> None:
    gradient = gradient.detach().reshape(-1, gradient.shape[-1]).float()
    ids = ids.reshape(-1)
    if len(ids) != len(gradient):  # a learned-position table that is called with other than its ids
        return
    live = gradient.abs().amax(dim=1) > 0
    if rows := int(live.sum()):
        counts = torch.bincount(ids[live], minlength=target.site.out_features)
        target.add(rows, counts=(counts,), gradients=(gradient, gradient))


def _by_example(rows: Tensor) -> Tensor:
    """(B, …, d) → (B, T, d); (B, d) is one row an example."""
    return rows.reshape(len(rows), -1, rows.shape[-1])
