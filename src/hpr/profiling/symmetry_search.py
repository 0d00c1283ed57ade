"""Find the symmetries of a model by trial.

The search applies each candidate transform to a copy of the model in float64. A candidate is a symmetry if the outputs stay the
same, but change if any one of its weights is transformed alone.
"""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from hpr.anatomy.lookup import module_at, weight_at
from hpr.anatomy.model import Anatomy, Site
from hpr.anatomy.symmetry import AxisSlice, Symmetry, layers_of, transform_site
from hpr.errors import HprError
from hpr.profiling.trial_pass import TrialPass, of_block, repeatable
from hpr.runtime.batch import POSITIONAL, Batch, BatchLike, as_batches, first_examples
from hpr.runtime.hooks import eval_mode, run, uncached
from hpr.runtime.torch_errors import does_not_fit

_log = logging.getLogger(__name__)
EXAMPLES = 2  # for each trial; 1 if the inputs cannot be shortened
POSITIONS = 24  # enough for heads to attend to different ones
TOO_FEW = 4  # with fewer all heads may attend alike, and seem to be one
EXACT = 1e-6  # what rounding may leave, as a share of what a weight transformed alone changes (norms compute in float32)


def find_symmetries(model: nn.Module, anatomy: Anatomy, batches: Sequence[BatchLike], seed: int = 0) -> tuple[Symmetry, ...]:
    """Return the symmetries of every stack of two or more layers. The model does not change.

    Each candidate is tried in the block of one layer first, then in all layers at once. This takes a few hundred passes of a
    block over two short examples. The result is empty if the model cannot run in float64, if its outputs differ from run to
    run, or if the examples have fewer than 4 positions.
    """
    batches = as_batches(batches)
    long_enough = [batch for batch in batches if _positions(batch) >= POSITIONS]
    chosen = min(long_enough, key=_positions) if long_enough else max(batches, key=_positions)
    if _positions(chosen) < TOO_FEW:
        _log.info("symmetries are not looked for: examples have fewer than %d positions", TOO_FEW)
        return ()
    batch = _double(first_examples(chosen, EXAMPLES))
    trial = _Trial(copy.deepcopy(model).double(), anatomy, seed)
    with torch.no_grad(), eval_mode(trial.model), uncached(trial.model):
        if not (trial.start(_shortened(batch)) or trial.start(first_examples(batch, 1)) or trial.start(_double(chosen))):
            _log.info("symmetries are not looked for: in float64 the model fails, or differs from run to run")
            return ()
        stacks = [stack.name for stack in anatomy.stacks if stack.layers > 1]
        return tuple(guess for stack in stacks for guess in _guesses(trial, stack) if trial.holds(guess))


class _Trial:
    """A copy of the model in float64 that applies candidate transforms and undoes them."""

    def __init__(self, model: nn.Module, anatomy: Anatomy, seed: int):
        self.model, self.anatomy = model, anatomy
        self.draw = torch.Generator().manual_seed(seed)
        self.whole = TrialPass(lambda: None, torch.empty(0))
        self.blocks: dict[str, TrialPass] = {}

    def start(self, batch: Batch) -> bool:
        """Return whether the model runs on a batch in float64 and gives equal outputs in two runs."""
        try:
            whole = repeatable(lambda: run(self.model, batch))
        except (RuntimeError, ValueError, IndexError) as error:  # some inputs cannot be cut
            if isinstance(error, HprError) or (isinstance(error, RuntimeError) and not does_not_fit(error)):
                raise
            _log.info("the model does not run on a trial batch in float64: %s", error)
            return False
        self.whole = whole or self.whole
        return whole is not None

    def block(self, stack: str, layer: int) -> TrialPass:
        """What a trial in one layer runs: its block, which costs a small part of the model; or the model."""
        path = next(one for one in self.anatomy.stacks if one.name == stack).block(layer)
        if path not in self.blocks:
            self.blocks[path] = of_block(module_at(self.model, path), self.whole.call) or self.whole
        return self.blocks[path]

    def sites(self, stack: str) -> list[Site]:
        """The matrices of the first of those layers that have the most."""
        layers: dict[int | None, list[Site]] = {}
        for site in self.anatomy.sites:
            if site.stack == stack and site.kind == "linear" and site.expert is None and not site.aliases:
                layers.setdefault(site.layer, []).append(site)
        return max(layers.values(), key=len, default=[])

    def works(self, symmetry: Symmetry, transform: Tensor, layer: int | None = None) -> bool:
        """Return whether a transform keeps the outputs, although each of its slices alone changes them."""
        layers = layers_of(self.anatomy, symmetry)
        chosen = layers if layer is None else {layer: layers[layer]}
        tried = self.whole if layer is None else self.block(symmetry.stack, layer)
        together = self._change(tried, chosen, symmetry.slices, transform)
        if not together < 1e-2 * float(tried.expected.norm()):  # most guesses end here
            return False
        return all(together < EXACT * self._change(tried, chosen, (part,), transform) for part in symmetry.slices)

    def holds(self, symmetry: Symmetry) -> bool:
        """Return whether a symmetry works in all of its layers at once, at least two."""
        return len(layers_of(self.anatomy, symmetry)) > 1 and self.works(symmetry, self.random(symmetry))

    def random(self, symmetry: Symmetry) -> Tensor:
        """Return a transform that moves every block: a cyclic order, sign flips or random rotations."""
        blocks, size = symmetry.blocks, symmetry.size
        if symmetry.kind == "order":
            cycle = torch.randperm(blocks, generator=self.draw)
            return torch.empty_like(cycle).scatter_(0, cycle, cycle.roll(1))
        if size == 1:
            return self.signs(blocks, size)
        return torch.linalg.qr(torch.randn(blocks, size, size, generator=self.draw, dtype=torch.float64))[0]

    def signs(self, blocks: int, size: int) -> Tensor:
        """Rotations that flip the sign of about half of the blocks."""
        signs = torch.randint(0, 2, (blocks, 1, 1), generator=self.draw).double() * 2 - 1
        signs[0] = -1
        return signs * torch.eye(size, dtype=torch.float64)

    def _change(
        self, tried: TrialPass, layers: Mapping[int, Mapping[str, Site]], slices: Sequence[AxisSlice], transform: Tensor
    ) -> float:
        touched = [(sites[one.slot], one) for sites in layers.values() for one in slices]
        values = [value for site in {site for site, _ in touched} for value in self._values(site)]
        before = [value.clone() for value in values]
        try:
            for site, one in touched:
                transform_site(self.model, site, one, transform)
            return float((tried.outputs() - tried.expected).norm())
        finally:
            for value, old in zip(values, before, strict=True):
                value.copy_(old)

    def _values(self, site: Site) -> Iterator[Tensor]:
        yield weight_at(self.model, site).data
        if site.has_bias:
            yield module_at(self.model, site.name).bias.data  # type: ignore[union-attr, misc]


def _guesses(trial: _Trial, stack: str) -> Iterator[Symmetry]:
    """Yield the symmetries that hold in one layer of a stack.

    Attention comes first: for each pair of value and output projection its values, its queries and keys, and its heads. The
    neurons of the other sites follow.
    """
    sites = trial.sites(stack)
    taken: set[AxisSlice] = set()
    for value, output in _pairs_of_values(trial, stack, sites):
        values = None if taken & {value, output} else _finest(trial, (value, output), stack, sites[0].layer)
        if values is None:
            continue
        yield values
        if values.size > 1:
            keys = _keys(trial, values, sites, taken)
            taken |= {value, output, *keys}
            guesses = [Symmetry(stack, "rotation", values.blocks, keys)] if keys else []
            if keys and values.blocks > 1:
                guesses.append(Symmetry(stack, "order", values.blocks, (*keys, *values.slices)))
            yield from (guess for guess in guesses if trial.works(guess, trial.random(guess), sites[0].layer))
    used = {axis_slice.slot for axis_slice in taken}
    yield from _neurons(trial, stack, [site for site in sites if site.slot not in used])


def _pairs_of_values(trial: _Trial, stack: str, sites: Sequence[Site]) -> Iterator[tuple[AxisSlice, AxisSlice]]:
    """Yield rows of one site and columns of another whose sign can change together: values and the output projection."""
    for target in sites:
        columns = AxisSlice(target.slot, "columns", 0, target.in_features)
        for source in sites:
            for rows in _row_slices(source, target.in_features):
                length = rows.stop - rows.start
                if source is target or target.in_features % length or length < 2:
                    continue
                guess = Symmetry(stack, "rotation", 1, (rows, columns))
                if trial.works(guess, -torch.eye(length, dtype=torch.float64)[None], target.layer):
                    yield rows, columns


def _row_slices(site: Site, length: int) -> Iterator[AxisSlice]:
    """Yield all rows of a site. If it joins two or three projections of the given length, yield the rows of each as well."""
    yield AxisSlice(site.slot, "rows", 0, site.out_features)
    for parts in (2, 3):
        if site.out_features == parts * length:
            yield from (AxisSlice(site.slot, "rows", part * length, (part + 1) * length) for part in range(parts))


def _finest(trial: _Trial, pair: tuple[AxisSlice, AxisSlice], stack: str, layer: int | None) -> Symmetry | None:
    """Return the rotation with the largest blocks that works, one block for each head; None if no rotation works.

    The number of blocks rises from 1. A block of one row only changes its sign.
    """
    length = pair[0].stop - pair[0].start
    for blocks in range(1, length + 1):
        if length % blocks == 0:
            guess = Symmetry(stack, "rotation", blocks, pair)
            if trial.works(guess, trial.random(guess), layer):
                return guess
    return None


def _keys(trial: _Trial, values: Symmetry, sites: Sequence[Site], taken: Set[AxisSlice]) -> tuple[AxisSlice, ...]:
    """Return the rows of the queries and keys that belong to the values, or nothing.

    They are the pair whose signs can change together, head by head.
    """
    value, output = values.slices
    users = (output.stop - output.start) // (value.stop - value.start)
    slices = [rows for site in sites for rows in _row_slices(site, output.stop) if rows not in (*taken, value)]
    for first, second in itertools.permutations(slices, 2):
        long, short = first.stop - first.start, second.stop - second.start
        if long != users * short or short % values.blocks or (users == 1 and second < first) or _overlap(first, second):
            continue
        guess = Symmetry(values.stack, "rotation", values.blocks, (first, second))
        if trial.works(guess, trial.signs(values.blocks, guess.size), sites[0].layer):
            return first, second
    return ()


def _neurons(trial: _Trial, stack: str, sites: Sequence[Site]) -> Iterator[Symmetry]:
    """Yield the orders of neurons: columns of one matrix with the rows of one other matrix, or of two (with a gate)."""
    for target in sites:
        columns = AxisSlice(target.slot, "columns", 0, target.in_features)
        rows = [
            axis_slice
            for site in sites
            for axis_slice in _row_slices(site, target.in_features)
            if site is not target and axis_slice.stop - axis_slice.start == target.in_features
        ]
        for chosen in (*((axis_slice,) for axis_slice in rows), *itertools.combinations(rows, 2)):
            guess = Symmetry(stack, "order", target.in_features, (*chosen, columns))
            if target.in_features > 1 and trial.works(guess, trial.random(guess), target.layer):
                yield guess
                break


def _overlap(first: AxisSlice, second: AxisSlice) -> bool:
    return first.slot == second.slot and first.start < second.stop and second.start < first.stop


def _double(batch: Batch) -> Batch:
    def widened(value: Any) -> Any:
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {key: widened(value) for key, value in batch.items()}


def _positions(batch: Batch) -> int:
    """Return how many numbers one example has in the first tensor of a batch."""
    return next(value.shape[1:].numel() for value in batch.values() if isinstance(value, Tensor))


def _shortened(batch: Batch) -> Batch:
    """Return the first positions of a batch of texts, in which every tensor is (examples, positions); else the batch."""
    if POSITIONAL in batch:  # the second axis of a plain module's input need not be positions
        return batch
    shapes = {tuple(value.shape) if isinstance(value, Tensor) else () for value in batch.values()}
    if len(shapes) > 1 or len(next(iter(shapes))) != 2:
        return batch
    return {key: value[:, :POSITIONS] for key, value in batch.items()}
