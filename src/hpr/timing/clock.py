"""Milliseconds: every module that reads a weight is timed where it stands, in passes of the whole model on this machine.

A pass has one *way*: all modules compute their own product, or first that of thin factors of one rank. The ways take turns, so
that a busy machine slows all of them. Weights, caches and inputs are then those of a real call, which they are not if one
product is repeated by itself. The numbers in the factors do not change the time, so they are views of the weight's own memory.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hpr.anatomy.lookup import has_module, module_at
from hpr.anatomy.model import Anatomy, Site
from hpr.nn.bank import FactorBank
from hpr.nn.embedding import SharedEmbedding
from hpr.nn.linear import SharedLinear
from hpr.plans.terms import Term
from hpr.runtime.batch import Batch
from hpr.runtime.hooks import eval_mode, run
from hpr.runtime.progress import progress
from hpr.timing.costs import Costs, Reading, SiteCost

SHARES = (0.125, 0.25, 0.5, 0.75, 1.0)  # of the largest rank that is timed; rank 1 is timed, too
_SECONDS = 5.0  # that the passes may take, about
_FEWEST, _MOST = 6, 60  # passes of each way
Interval = tuple[float, float]  # start and end of a call, in seconds


def measured_costs(model: nn.Module, anatomy: Anatomy, batch: Batch) -> Costs:
    """The milliseconds of one call with ``batch`` (on the model's device), in total and by site. The model is left as it was.

    The time of factors is that of a copy for inference (``hpr.materialise``): no identity blocks are put together, and a
    Linear never takes longer than with its whole weight. A call is divided into the products and the gaps between them, and
    the fastest of all passes counts for each, since another process seldom interrupts something that short in every pass.
    """
    readers = list(_readers(model, anatomy))
    ways = range(len(SHARES) + 2)
    gaps = _timed(model, readers, ways, batch)

    def outside(changed: nn.Module) -> float:
        return _timed(changed, list(_readers(changed, anatomy)), ways[:1], batch)

    def share_of(changed: nn.Module) -> float:
        return _ratio(changed, model, batch)

    rows = [reader.rows for reader in readers if reader.rows and not reader.looks_up]
    positions = max(set(rows), key=rows.count) if rows else 1
    return Costs("ms", gaps, _by_site(readers), positions, batch, outside, share_of)


def _timed(model: nn.Module, readers: Sequence[Reader], ways: Sequence[int], batch: Batch) -> float:
    """Time the readers in each way. Returns the milliseconds of the gaps between them."""
    cuda = next((parameter.is_cuda for parameter in model.parameters()), False)
    gaps: list[list[float]] = []
    with torch.no_grad(), eval_mode(model):
        run(model, batch)
        start, end = _interval(lambda: run(model, batch), cuda)
        passes = int(min(_MOST, max(_FEWEST, _SECONDS / (1.6 * (end - start) * len(SHARES)))))
        for number in range(passes + 1):  # the first round warms up
            for way in ways if number % 2 else reversed(ways):
                calls: list[Interval] = []
                with _clocks(readers, way, cuda, calls):
                    whole = _interval(lambda: run(model, batch), cuda)
                for reader in readers:
                    reader.settle(way, keep=number > 0)
                if way == 0 and number > 0:
                    edges = [whole[0], *(edge for call in calls for edge in call), whole[1]]
                    gaps.append([1000 * (after - before) for before, after in zip(edges[::2], edges[1::2], strict=True)])
            progress("time", number + 1, passes + 1)
    alike = [one for one in gaps if len(one) == len(gaps[0])]  # a model may call its modules in another number of times
    return float(np.min(alike, axis=0).sum())


def _ratio(changed: nn.Module, model: nn.Module, batch: Batch) -> float:
    """The time of a whole call of a changed copy, as a share of the model's: the fastest of many calls that take turns."""
    cuda = next((parameter.is_cuda for parameter in model.parameters()), False)
    both, fastest = (changed, model), [float("inf"), float("inf")]
    end = time.perf_counter() + _SECONDS
    with torch.no_grad(), eval_mode(changed), eval_mode(model):
        number = 0
        while number < 4 * _MOST and (number <= 2 * _FEWEST or time.perf_counter() < end):
            for place in (0, 1) if number % 2 else (1, 0):
                start, stop = _interval(lambda one=both[place]: run(one, batch), cuda)  # type: ignore[misc]
                if number:  # the first calls warm up
                    fastest[place] = min(fastest[place], stop - start)
            number += 1
    return fastest[0] / fastest[1]


@dataclass(eq=False)
class Reader:
    """A module that reads the weight of a site, and the seconds that it took in each way."""

    site: Site
    module: nn.Module
    tied: bool
    rows: int = 0  # vectors in one call
    spent: float = 0.0
    seconds: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))

    @property
    def looks_up(self) -> bool:
        return isinstance(self.module, nn.Embedding)

    @property
    def ranks(self) -> list[int]:
        """The rank of each way from 1 up, ascending. A product above the last one costs more than the whole weight."""
        out, inner = self.site.out_features, self.site.in_features
        full = min(out, inner)
        most = full if self.looks_up or self.tied else max(1, min(full, out * inner // (out + inner)))
        return [1, *(max(1, int(share * most)) for share in SHARES)]

    def settle(self, way: int, keep: bool) -> None:
        """Note the seconds of a pass."""
        if keep:
            self.seconds[way].append(self.spent)
        self.spent = 0.0

    def thin(self, rank: int) -> nn.Module:
        """A module like this one with factors of a rank."""
        out = self.site.out_features
        rows = (0, out - 1) if self.looks_up and out > 1 else None  # runs of rows are masked, which takes time
        term = Term("u", "v", rank, rows=rows)
        kind: Any = SharedEmbedding if self.looks_up else SharedLinear
        with torch.device("meta"):
            bank = FactorBank(term.shapes(self.site))
            module = kind(bank, (term,), self.module)
        weight: Tensor = self.module.weight  # type: ignore[assignment]
        numbers = weight.detach().reshape(-1)
        for name, shape in term.shapes(self.site).items():
            needed = shape.rows * shape.columns
            part = numbers[:needed] if name == "u" else numbers[len(numbers) - needed :]
            bank[name].weight = nn.Parameter(part.view(shape.rows, shape.columns), requires_grad=False)
        return module.eval()  # type: ignore[no-any-return]


def _readers(model: nn.Module, anatomy: Anatomy) -> Iterator[Reader]:
    """Every module that reads the weight of a site; experts, which are computed together, are left out."""
    for site in anatomy.sites:
        if site.expert is not None:
            continue
        modules = dict.fromkeys(module_at(model, path) for path in (site.name, *site.aliases) if has_module(model, path))
        for module in modules:
            yield Reader(site, module, tied=any(isinstance(one, nn.Embedding) for one in modules))


@contextmanager
def _clocks(readers: Sequence[Reader], way: int, cuda: bool, calls: list[Interval]) -> Iterator[None]:
    """Inside the block each module times itself, or a product of thin factors before it computes its own."""
    before = {reader.module: vars(reader.module).get("forward") for reader in readers}
    for reader in readers:
        reader.module.forward = _clocked(reader, way, cuda, calls)
    try:
        yield
    finally:
        for module, forward in before.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _clocked(reader: Reader, way: int, cuda: bool, calls: list[Interval]) -> Callable[..., Any]:
    own = reader.module.forward
    thin = reader.thin(reader.ranks[way - 1]) if way else None

    def forward(*args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else next(iter(kwargs.values()))
        reader.rows = x.numel() if reader.looks_up else x.numel() // x.shape[-1]
        given: list[Any] = []
        interval = _interval((lambda: given.append(own(*args, **kwargs))) if thin is None else (lambda: thin(x)), cuda)
        reader.spent += interval[1] - interval[0]
        calls.append(interval)
        return given[0] if given else own(*args, **kwargs)

    return forward


def _interval(call: Callable[[], Any], cuda: bool) -> Interval:
    """The start and end of a call: by the clock, or in time of the thread if it computes everything.

    The two are equal if nothing else runs; the time of a thread stands still while other processes have the processor.
    """
    now = time.perf_counter if cuda or torch.get_num_threads() > 1 else time.thread_time
    if cuda:
        torch.cuda.synchronize()
    start = now()
    call()
    if cuda:
        torch.cuda.synchronize()
    return start, now()


def _by_site(readers: Sequence[Reader]) -> dict[str, SiteCost]:
    """Readers of one kind and shape have the mean time of all of them, which no chance of one of them distorts."""
    alike: dict[tuple, list[Reader]] = defaultdict(list)
    for reader in readers:
        kind = (reader.looks_up, reader.tied, reader.site.out_features, reader.site.in_features, reader.rows)
        alike[kind].append(reader)
    readings: dict[str, list[Reading]] = defaultdict(list)
    for several in alike.values():
        ways = range(len(SHARES) + 2)
        times = [1000 * float(np.mean([min(one.seconds[way]) for one in several])) for way in ways]
        first = several[0]
        full = min(first.site.out_features, first.site.in_features)
        ranks = [0, *first.ranks, full + 1]
        growing = np.maximum.accumulate(times[1:])
        dear = max(growing[-1], times[0])
        thin = np.interp(np.arange(full + 1), ranks, [growing[0], *growing, dear])
        reading = Reading(times[0], thin, first.looks_up, falls_back=not (first.looks_up or first.tied))
        for one in several:
            readings[one.site.name].append(reading)
    sites = {reader.site.name: reader.site for reader in readers}
    return {name: SiteCost(sites[name].out_features, sites[name].in_features, tuple(found)) for name, found in readings.items()}
