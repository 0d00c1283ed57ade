"""Curvature per site from calibration batches: second moments of inputs and output gradients, accumulated in a stream.

All parameters are frozen while this runs, so a backward pass computes activation gradients only. A row is *live* where its
gradient is not zero; padding, and positions the objective never reads, drop out by themselves, without knowing the mask.
"""

from __future__ import annotations

import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hpr.anatomy import Anatomy, Site, module_at
from hpr.errors import HprError
from hpr.profiling.objectives import Batch, Objective, call, examples_in
from hpr.profiling.profile import SiteStatistics

DIAGONAL_ABOVE = 8192
Progress = Callable[[str, int, int], None]


def silent(stage: str, done: int, total: int) -> None:
    """The progress callback that shows nothing."""


def memory_needed(anatomy: Anatomy) -> int:
    """Bytes that the second moments of all sites take, known before the first batch (float64)."""
    return 8 * sum(
        (site.out_features if site.kind == "embedding" else _entries(site.out_features)) + _entries(site.in_features)
        for site in anatomy.sites
    )


def measure_curvature(
    model: nn.Module,
    anatomy: Anatomy,
    batches: Sequence[Batch],
    objective: Objective,
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[dict[str, SiteStatistics], int]:
    """Statistics of every site over the batches, and the number of examples.

    Raises ``HprError`` for no batches, and for a loss that is not finite (naming the batch).
    """
    if not batches:
        raise HprError("no calibration batches: at least one is needed")
    generator = torch.Generator().manual_seed(seed)
    moments = {site.name: _Moments(site) for site in anatomy.sites}
    shared: dict[tuple[int, ...], list[tuple[Tensor, Tensor, Tensor]]] = {}
    examples = 0
    with _frozen(model), _hooks(model, anatomy, moments, shared):
        for index, batch in enumerate(batches):
            loss = objective.loss(call(model, batch), batch, generator)
            if not torch.isfinite(loss):
                raise HprError(f"the loss of calibration batch {index} is {loss.item()}: remove non-finite inputs from it")
            loss.backward()
            shared.clear()
            examples += examples_in(batch)
            progress("curvature", index + 1, len(batches))
    return _deduplicated({name: moment.finish(examples) for name, moment in moments.items()}), examples


def peak_memory() -> int:
    """The process's peak resident memory so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _entries(side: int) -> int:
    return side if side > DIAGONAL_ABOVE else side * side


@dataclass
class _Moments:
    """Sums over live rows for one site; tied modules add to the same sums."""

    site: Site
    left: Tensor | None = None
    right: Tensor | None = None
    mean: Tensor | None = None
    rows: int = 0
    head: _Moments | None = field(default=None)

    def add(self, left: Tensor, right: Tensor, mean: Tensor | None, rows: int) -> None:
        self.left = left.double() if self.left is None else self.left + left
        self.right = right.double() if self.right is None else self.right + right
        if mean is not None:
            self.mean = mean.double() if self.mean is None else self.mean + mean
        self.rows += rows

    def finish(self, examples: int) -> SiteStatistics:
        if self.head is not None and self.head.rows:
            return _combined(self.own(examples), self.head.finish(examples))
        return self.own(examples)

    def own(self, examples: int) -> SiteStatistics:
        if not self.rows or self.left is None or self.right is None or not float(self.left.sum()):
            left, right = torch.zeros(self.site.out_features), torch.zeros(self.site.in_features)
            return SiteStatistics(left.double(), right.double(), 0.0)
        parts = (self.left, self.right) if self.mean is None else (self.left, self.right, self.mean)
        if not all(torch.isfinite(part).all() for part in parts):
            raise HprError(f"{self.site.name}: its activations or gradients are not finite on the calibration data")
        mean = None if self.mean is None else (self.mean / self.rows).cpu()
        return SiteStatistics((self.left / self.rows).cpu(), (self.right / self.rows).cpu(), self.rows / examples, mean)


def _combined(table: SiteStatistics, head: SiteStatistics) -> SiteStatistics:
    """One Kronecker product for a matrix used both as embedding and as output head, weighted by each use's mass."""
    if not table.live:
        return head
    masses = [part.rows * _trace(part.left) * _trace(part.right) for part in (table, head)]
    shares = [mass / sum(masses) for mass in masses]
    left = sum(share * part.left / _trace(part.left) for share, part in zip(shares, (table, head), strict=True))
    right = sum(share * part.right / _trace(part.right) for share, part in zip(shares, (table, head), strict=True))
    assert isinstance(left, Tensor)
    assert isinstance(right, Tensor)
    return SiteStatistics(left, right, sum(masses), None)


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
def _hooks(model: nn.Module, anatomy: Anatomy, moments: dict[str, _Moments], shared: dict) -> Iterator[None]:
    handles = []
    for site in anatomy.sites:
        for path in (site.path, *site.aliases):
            module = module_at(model, path)
            target = moments[site.name]
            if site.kind == "embedding" and isinstance(module, nn.Linear):  # a tied head: another use, another product
                target.head = target.head or _Moments(site)
                target = target.head
            handles.append(module.register_forward_hook(_recorder(target, shared)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _recorder(target: _Moments, shared: dict) -> Callable:
    def record(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
        x = inputs[0].detach()
        if not output.requires_grad:
            output = output.detach().requires_grad_().clone()  # nothing below has a graph; cloned so that += stays legal
        if isinstance(module, nn.Embedding):
            output.register_hook(lambda gradient: _add_embedding(target, module, x, gradient))
        else:
            output.register_hook(lambda gradient: _add_linear(target, x, gradient, shared))
        return output

    return record


def _add_linear(target: _Moments, x: Tensor, gradient: Tensor, shared: dict) -> None:
    gradient = gradient.detach().reshape(-1, gradient.shape[-1]).float()
    live = gradient.abs().amax(dim=1) > 0
    rows = int(live.sum())
    if not rows:
        return
    key = (x.data_ptr(), *x.shape)  # query, key and value read the same tensor: their input moment is computed once
    known = next((entry for entry in shared.setdefault(key, []) if torch.equal(entry[0], live)), None)
    if known is None:
        x_live = x.reshape(-1, x.shape[-1])[live].float()
        known = (live, _moment(x_live), x_live.sum(0))
        shared[key].append(known)
    target.add(_moment(gradient[live]), known[1], known[2], rows)


def _add_embedding(target: _Moments, module: nn.Embedding, ids: Tensor, gradient: Tensor) -> None:
    gradient = gradient.detach().reshape(-1, gradient.shape[-1]).float()
    ids = ids.reshape(-1)
    if len(ids) != len(gradient):  # a learned-position table that is called with other than its ids
        return
    live = gradient.abs().amax(dim=1) > 0
    if rows := int(live.sum()):
        counts = torch.bincount(ids[live], minlength=module.num_embeddings)
        target.add(counts.double(), _moment(gradient[live]), None, rows)


def _moment(rows: Tensor) -> Tensor:
    return rows.T @ rows if rows.shape[1] <= DIAGONAL_ABOVE else rows.square().sum(0)


def _deduplicated(sites: dict[str, SiteStatistics]) -> dict[str, SiteStatistics]:
    """The same values become the same object, so that they are factorised and stored once."""
    seen: dict[tuple[int, ...], list[Tensor]] = {}
    result = {}
    for name, site in sites.items():
        for known in seen.setdefault(tuple(site.right.shape), []):
            if torch.equal(known, site.right):
                site = SiteStatistics(site.left, known, site.rows, site.mean)
                break
        else:
            seen[tuple(site.right.shape)].append(site.right)
        result[name] = site
    return result
