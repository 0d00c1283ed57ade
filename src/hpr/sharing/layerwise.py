"""Run teacher and student layer by layer, side by side, and sum up what each site receives and should give."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from hpr.anatomy.lookup import module_at
from hpr.anatomy.model import Site, Stack
from hpr.operators import damping
from hpr.operators.metric import Measured, Side
from hpr.profiling.layer_features import real_positions
from hpr.runtime.batch import Batch, mask_of
from hpr.runtime.hooks import run, uncached


@dataclass
class RegressionSums:
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
        second = self.xx / self.rows
        rounding = damping.FLOAT32 * float(second.diagonal().mean()) + damping.NOTHING  # inputs that never vary leave no more
        inputs = damping.damped(second - (torch.outer(x, x) if centred else 0), 0.0) + rounding * torch.eye(len(x)).to(x)
        cross = self.tx / self.rows - (torch.outer(t, x) if centred else 0)
        pull = damping.REGRESSION * float(inputs.diagonal().mean()) + rounding  # towards the original weight
        weight = damping.solve(damping.damped(inputs, damping.REGRESSION), (cross + pull * one.weight).T).T
        return Measured(one.site, weight, one.left, Side(inputs), one.rows, one.mean)


@dataclass
class BlockCalls:
    """The hidden states before a layer of one model, and the other arguments of every layer's call."""

    hidden: Tensor
    calls: list[tuple[tuple, dict[str, Any]]] = field(default_factory=list)

    def run(self, block: nn.Module, layer: int) -> Tensor:
        positional, named = self.calls[layer]
        if positional:
            output = block(self.hidden, *positional[1:], **named)
        else:
            output = block(**{**named, "hidden_states": self.hidden})
        return output if isinstance(output, Tensor) else output[0]


@dataclass(frozen=True)
class Layer:
    """One layer of a stack in both models."""

    stack: Stack
    number: int
    teacher: nn.Module
    student: nn.Module

    def module(self, block: nn.Module, site: Site) -> nn.Module:
        """The module of a site inside one of the two blocks."""
        return block.get_submodule(site.name.removeprefix(f"{self.stack.block(self.number)}."))


@dataclass
class ModelPair:
    """Teacher and student before the same layer, on the same batch. ``turned``: see ``profiling.layout.turned_modules``."""

    teacher: BlockCalls
    student: BlockCalls
    batch: Batch
    turned: Collection[nn.Module] = ()

    def advance(self, layer: Layer) -> None:
        """Go on to the layer above: hidden states become what the blocks of this one emit."""
        self.teacher.hidden = self.teacher.run(layer.teacher, layer.number)
        self.student.hidden = self.student.run(layer.student, layer.number)


def record_calls(model: nn.Module, stack: Stack, batch: Batch) -> BlockCalls:
    """Run a model once and note how each block of a stack is called."""
    calls: list[tuple[tuple, dict[str, Any]]] = []
    first: list[Tensor] = []

    def note(module: nn.Module, positional: tuple, named: dict[str, Any]) -> None:
        hidden = positional[0] if positional else named["hidden_states"]
        if not first:
            first.append(hidden.detach())
        slim = {name: without_cache(value) for name, value in named.items() if name != "hidden_states"}
        calls.append(((None, *map(without_cache, positional[1:])) if positional else (), slim))

    handles = [module_at(model, path).register_forward_pre_hook(note, with_kwargs=True) for path in stack.blocks]
    try:
        with uncached(model):
            run(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return BlockCalls(first[0], calls)


def without_cache(value: Any) -> Any:
    """An argument of a block's call; None for a cache, which would remember this call in the next, whatever its name."""
    return None if isinstance(value, Cache) else value


def stages(layer: Layer, sites: Sequence[Site], pair: ModelPair) -> Iterator[list[Site]]:
    """Sites in the order of their calls, those that read the same tensor (query, key, value) together."""
    order: list[tuple[Tensor, Site]] = []  # inputs are held, so that none comes to lie where another was

    def note(site: Site) -> Callable:
        return lambda module, inputs: order.append((inputs[0], site))

    handles = [layer.module(layer.teacher, site).register_forward_pre_hook(note(site)) for site in sites]
    try:
        pair.teacher.run(layer.teacher, layer.number)
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


def observe(layer: Layer, stage: Sequence[Site], pairs: Sequence[ModelPair]) -> dict[Site, RegressionSums]:
    """Run both blocks of a layer on every batch and sum up what the sites of a stage receive and should give."""
    sums: dict[Site, RegressionSums] = {}
    for pair in pairs:
        with (
            watching(layer, layer.teacher, stage) as seen_teacher,
            watching(layer, layer.student, stage) as seen_student,
        ):
            outputs = [
                pair.teacher.run(layer.teacher, layer.number),
                pair.student.run(layer.student, layer.number),
            ]
        for site in stage:
            teacher, student = seen_teacher[site], seen_student[site]
            for seen, output in ((teacher, outputs[0]), (student, outputs[1])):
                seen.later.append(output)
            residual = teacher.residual_place()
            target = teacher.output
            if residual is not None:
                target = teacher.later[residual] - (student.later[residual] - student.output)
            rows = real_rows(pair.batch, layer.stack, student.input, layer.module(layer.teacher, site) in pair.turned)
            sums.setdefault(site, RegressionSums()).add(
                student.input[rows].flatten(0, -2).float(), target[rows].flatten(0, -2).float()
            )
    return sums


def real_rows(batch: Batch, stack: Stack, x: Tensor, turned: bool = False) -> Tensor | slice:
    """Rows of a site's input that are no padding: positions of the decoder or, for keys and values across, of the encoder."""
    if x.dim() != 3:
        return slice(None)
    return (mask_of(batch, x, turned) * real_positions(batch, stack, x, turned)).bool()


@dataclass
class SiteRecord:
    """The input and output of a site in one call of a block, the tensors before, and those that norms read after."""

    earlier: list[Tensor]
    input: Tensor = field(default_factory=lambda: torch.empty(0))
    output: Tensor = field(default_factory=lambda: torch.empty(0))
    later: list[Tensor] = field(default_factory=list)

    def residual_place(self) -> int | None:
        """Which later tensor is this output plus an earlier one, so that it is the residual stream; None if no tensor is."""
        for position, later in enumerate(self.later):
            if later.shape != self.output.shape:
                continue
            rest = later - self.output
            scale = float(later.abs().max())
            for earlier in self.earlier:
                if earlier.shape == rest.shape and float((rest - earlier).abs().max()) <= 1e-4 * scale:
                    return position
        return None


@contextmanager
def watching(layer: Layer, block: nn.Module, stage: Sequence[Site]) -> Iterator[dict[Site, SiteRecord]]:
    """Record the stage's sites, the block's input, and what its norms (modules with one-dimensional weights) read and give."""
    stream: list[Tensor] = []
    seen: dict[Site, SiteRecord] = {}

    def enter(module: nn.Module, positional: tuple, named: dict[str, Any]) -> None:
        stream.append(positional[0] if positional else named["hidden_states"])

    def norm(module: nn.Module, inputs: tuple, output: Tensor) -> None:
        for one in seen.values():
            one.later.append(inputs[0])
        stream.extend((inputs[0], output))

    def record(site: Site) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            seen[site] = SiteRecord(list(stream), inputs[0], output)

        return hook

    handles = [block.register_forward_pre_hook(enter, with_kwargs=True)]
    for module in block.modules():
        own = dict(module.named_parameters(recurse=False))
        if "weight" in own and own["weight"].dim() == 1:
            handles.append(module.register_forward_hook(norm))
    handles += [layer.module(block, site).register_forward_hook(record(site)) for site in stage]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
