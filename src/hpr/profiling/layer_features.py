"""Measure features of each layer with forward passes: similarity, block influence, context dependence.

- *Similarity*: linear centred kernel alignment (CKA; Kornblith et al., 2019) between the outputs of two layers, pooled over
  real positions. At 1 the outputs are equal up to a rotation and a scale.
- *Block influence*: 1 − cos between a block's input and its output (ShortGPT; Men et al., 2024).
- *Context dependence*: the change of a layer's output, as 1 − cos, at positions that keep their token if half of the other
  positions come from another example. The replacement applies to the hidden states that enter a stack. For embeddings that
  read one position at a time, this equals the replacement of tokens. It also works for images, audio and plain modules,
  which have no token ids.

All three suggest which layers could share. The predicted damage says what sharing costs.

Suffixes of names: B examples, T positions, D width, N pooled examples, L layers.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hpr.anatomy.lookup import module_at
from hpr.anatomy.model import Anatomy, Stack
from hpr.errors import HprError
from hpr.profiling.first_pass import readable_part
from hpr.profiling.layout import turned_modules
from hpr.profiling.profile import LayerFeatures
from hpr.runtime.batch import Batch, BatchLike, as_batches, examples_in, first_examples, has_positions_first, mask_of
from hpr.runtime.hooks import entering, eval_mode, run
from hpr.runtime.progress import progress

_log = logging.getLogger(__name__)
POOLED_EXAMPLES = 512
CONTEXT_BATCHES = 8
CONTEXT_EXAMPLES = 16  # of each of those batches: all layers' hidden states are held at once
Visit = Callable[[int, Tensor, Tensor], None]  # layer, its input and its output, both (B, T, D)


def measure_layers(model: nn.Module, anatomy: Anatomy, batches: Sequence[BatchLike], seed: int = 0) -> dict[str, LayerFeatures]:
    """Return the features of every stack whose blocks the model calls, by stack name. The model does not change.

    A stack is left out if the states of its blocks cannot be told apart by example.

    The function reads at most 512 examples, from evenly spread batches because batches may be sorted by length. Context
    dependence reads 16 examples of at most 8 batches; ``seed`` draws the positions to replace. Raises ``HprError`` for no
    batches, and for hidden states that are not finite (naming layer and batch).
    """
    if not batches:
        raise HprError("no calibration batches: give at least one")
    batches = as_batches(batches)
    chosen = _spread(batches, POOLED_EXAMPLES)
    generator = torch.Generator().manual_seed(seed)
    context = chosen[:: -(-len(chosen) // CONTEXT_BATCHES)]
    total = len(chosen) + len(context)
    with torch.no_grad(), eval_mode(model):
        part, _ = readable_part(model, batches[context[0]], CONTEXT_EXAMPLES)
        whole = part is batches[context[0]]  # such batches cannot be cut
        parts = [batches[index] if whole else first_examples(batches[index], CONTEXT_EXAMPLES) for index in context]
        turned = turned_modules(model, [*(batches[index] for index in chosen), *parts])
        watched = {stack.name: _Stack(stack, _blocks(model, stack), turned) for stack in anatomy.stacks}
        for done, index in enumerate(chosen, 1):
            _pool(model, watched, batches[index], index)
            progress("features", done, total)
        for done, part in enumerate(parts, len(chosen) + 1):
            _replace(model, watched, part, generator)
            progress("features", done, total)
    return {name: stack.features() for name, stack in watched.items() if all(stack.pooled)}


def real_positions(
    batch: Batch, stack: Stack, hidden: Float[Tensor, "batch tokens d"], turned: bool = False
) -> Float[Tensor, "batch tokens"]:
    """Return 1 for real positions and 0 for padding, in float64 (``turned``: see ``has_positions_first``).

    In an encoder-decoder model, the mask of the decoder comes from ``decoder_attention_mask`` or from the labels.
    """
    if "decoder" in stack.path:
        if "decoder_attention_mask" in batch:
            batch = {"attention_mask": batch["decoder_attention_mask"]}
        elif "labels" in batch:
            batch = {"attention_mask": batch["labels"] != -100}
        elif any(key.startswith("decoder_") for key in batch):
            batch = {}
    return mask_of(batch, hidden, turned).double()


@dataclass
class _Stack:
    """The measurements of one stack. ``turned``: see ``turned_modules``; ``pooled[layer]``: a list of (B, D), float64."""

    stack: Stack
    blocks: list[nn.Module]
    turned: Collection[nn.Module]
    pooled: list[list[Tensor]] = field(init=False)
    influence: list[_Mean] = field(init=False)
    context: list[_Mean] = field(init=False)

    def __post_init__(self) -> None:
        self.pooled = [[] for _ in self.blocks]
        self.influence, self.context = ([_Mean() for _ in self.blocks] for _ in range(2))

    def features(self) -> LayerFeatures:
        pooled = [torch.cat(parts)[:POOLED_EXAMPLES] for parts in self.pooled]
        return LayerFeatures(
            similarity=cka_matrix(pooled),
            block_influence=[mean.value for mean in self.influence],
            context_dependence=[mean.value for mean in self.context],
        )


@dataclass
class _Mean:
    total: float = 0.0
    weight: float = 0.0

    def add(self, values: Tensor, weights: Tensor) -> None:
        self.total += float(torch.where(weights > 0, values, 0.0).sum())  # values at padding may be nan
        self.weight += float(weights.sum())

    @property
    def value(self) -> float:
        return max(self.total / self.weight, 0.0) if self.weight else 0.0  # rounding may leave −1e-17


def _pool(model: nn.Module, watched: Mapping[str, _Stack], batch: Batch, index: int) -> None:
    """One forward pass: pooled outputs and block influence."""

    def visitor(stack: _Stack) -> Visit:
        def visit(layer: int, x_BTD: Tensor, y_BTD: Tensor) -> None:
            mask = real_positions(batch, stack.stack, y_BTD)
            real = mask.unsqueeze(-1)
            pooled = torch.where(real > 0, y_BTD.double(), 0.0).sum(1) / real.sum(1).clamp(min=1.0)
            if not torch.isfinite(pooled).all():
                raise HprError(
                    f"layer {layer} of {stack.stack.name} gives values that are not finite on calibration batch {index}: "
                    f"remove non-finite inputs from it"
                )
            stack.pooled[layer].append(pooled.cpu())
            same_width = x_BTD.shape == y_BTD.shape  # a block that changes the shape cannot be left out
            stack.influence[layer].add(_distance(x_BTD, y_BTD) if same_width else torch.ones_like(mask), mask)

        return visit

    with _visiting(watched, batch, visitor):
        run(model, batch)


def _replace(model: nn.Module, watched: Mapping[str, _Stack], batch: Batch, generator: torch.Generator) -> None:
    """Two forward passes, the second with half of the positions replaced where hidden states enter each stack."""
    original: dict[tuple[str, int], Tensor] = {}
    stays: dict[str, Tensor] = {}

    def remember(stack: _Stack) -> Visit:
        return lambda layer, x, y: original.update({(stack.stack.name, layer): y})

    def compare(stack: _Stack) -> Visit:
        def visit(layer: int, x_BTD: Tensor, y_BTD: Tensor) -> None:
            kept = stays.get(stack.stack.name)
            if kept is not None and kept.shape == y_BTD.shape[:2]:  # a block that merges positions has left the entrance's
                stack.context[layer].add(_distance(original[stack.stack.name, layer], y_BTD), kept)

        return visit

    def entrance(stack: _Stack) -> Callable:
        def swap(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
            if stack.stack.name in stays:
                return None  # a block that is run several times is entered once
            raw = entering(args, kwargs)
            first = stack.blocks[0] in stack.turned
            x_BTD = _as_positions(raw, batch, first)
            if x_BTD is None:
                return None
            swapped, kept = _swap(x_BTD, real_positions(batch, stack.stack, x_BTD), generator)
            stays[stack.stack.name] = kept
            swapped = swapped.transpose(0, 1) if has_positions_first(raw, batch, first) else swapped.reshape(raw.shape)
            changed = tuple(swapped if value is raw else value for value in args)
            return changed, {key: swapped if value is raw else value for key, value in kwargs.items()}

        return swap

    with _visiting(watched, batch, remember):
        run(model, batch)
    handles = [stack.blocks[0].register_forward_pre_hook(entrance(stack), with_kwargs=True) for stack in watched.values()]
    try:
        with _visiting(watched, batch, compare):
            run(model, batch)
    finally:
        for handle in handles:
            handle.remove()


def _swap(x_BTD: Tensor, mask: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return hidden states with about half of the positions replaced, and the (B, T) float mask of the other real positions.

    A position is replaced by the same position of the previous example if both are real. A single example uses its other
    half instead. The first real position is not replaced, because most models treat it specially.
    """
    examples, positions = mask.shape
    shift, dim = (1, 0) if examples > 1 else (positions // 2, 1)
    other, other_mask = x_BTD.roll(shift, dim), mask.roll(shift, dim)
    drawn = torch.rand(examples, positions, generator=generator).to(mask.device) < 0.5
    first = F.one_hot(mask.argmax(dim=1), positions).bool()
    replaced = drawn & (mask > 0) & (other_mask > 0) & ~first
    return torch.where(replaced.unsqueeze(-1), other, x_BTD), mask * ~replaced


def cka_matrix(pooled: Sequence[Float[Tensor, "examples d"]]) -> list[list[float]]:
    """Return the linear CKA between all layers, (L, L). It uses Gram matrices (N, N), so widths may differ."""
    grams = []
    for x_ND in pooled:
        centred_ND = x_ND.double() - x_ND.double().mean(0)
        size = centred_ND.abs().max()
        varies = size > 1e-12 * x_ND.abs().max()  # else what centring leaves is rounding
        x_ND = centred_ND / size if varies else torch.zeros_like(centred_ND)  # squares of squares stay within range
        gram = (x_ND @ x_ND.T).flatten()
        grams.append(gram / gram.norm().clamp(min=1e-150))
    stacked = torch.stack(grams)
    similarity = (stacked @ stacked.T).clamp(0.0, 1.0).fill_diagonal_(1.0)
    return similarity.tolist()


def _distance(first: Tensor, second: Tensor) -> Tensor:
    """Return 1 − cos over the last dimension, in float64 because float32 is too coarse for cosines near 1."""
    return 1.0 - F.cosine_similarity(first.double(), second.double(), dim=-1, eps=1e-30)


def _blocks(model: nn.Module, stack: Stack) -> list[nn.Module]:
    return [module_at(model, path) for path in stack.blocks]


@contextmanager
def _visiting(watched: Mapping[str, _Stack], batch: Batch, visitor: Callable[[_Stack], Visit]) -> Iterator[None]:
    """Call a visitor for every layer during a forward pass."""
    handles = []
    for stack in watched.values():
        visit = visitor(stack)
        for layer, block in enumerate(stack.blocks):
            handles.append(block.register_forward_hook(_caller(visit, layer, stack, batch), with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _caller(visit: Visit, layer: int, stack: _Stack, batch: Batch) -> Callable:
    called, turned = False, stack.blocks[layer] in stack.turned

    def hook(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        nonlocal called
        if called:
            return  # a block that is run several times counts as it is run first
        called = True
        given, returned = (_as_positions(value, batch, turned) for value in (entering(args, kwargs), _first(output)))
        if given is not None and returned is not None:
            visit(layer, given, returned)
        elif not layer:
            _log.info("no features of the layers of %s: their states are not those of the batch's examples", stack.stack.name)

    return hook


def _first(output: Any) -> Any:
    """What a block returns first: its hidden states. Some blocks return their tuple inside another."""
    while isinstance(output, Mapping | tuple | list) and output:
        output = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    return output


def _as_positions(hidden: Any, batch: Batch, turned: bool) -> Tensor | None:
    """(B, D), (B·T, D), (B, T, D), (T, B, D) or (B, H, W, D) as (B, T, D); None for anything else."""
    examples = examples_in(batch)
    if not isinstance(hidden, Tensor) or hidden.dim() < 2 or hidden[..., 0].numel() % examples:
        return None
    if has_positions_first(hidden, batch, turned):
        return hidden.transpose(0, 1)
    if hidden.dim() == 3 and len(hidden) != examples == hidden.shape[1] and len(hidden) % examples:
        return None  # positions first, but not those of an input
    return hidden.reshape(examples, -1, hidden.shape[-1])


def _spread(batches: Sequence[Batch], limit: int) -> list[int]:
    """Return the indices of evenly spread batches that hold at least ``limit`` examples, or of all batches."""
    needed = -(-limit * len(batches) // max(1, sum(examples_in(batch) for batch in batches)))
    count = min(len(batches), max(1, needed))
    return [index * len(batches) // count for index in range(count)]
