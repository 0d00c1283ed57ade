"""Find the modules of a model whose hidden states have positions first: (positions, batch, d), as inside XLNet and FSMT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hpr.profiling.first_pass import readable_part, reading
from hpr.runtime.batch import Batch, examples_in, has_positions_first, is_square, lengths_in
from hpr.runtime.hooks import eval_mode, run_noting


def turned_modules(model: nn.Module, batches: Sequence[Batch]) -> frozenset[nn.Module]:
    """The modules that take states with positions first; none if the shapes of all ``batches`` tell it themselves.

    In a batch of as many examples as positions, (B, T, d) and (T, B, d) look alike. One such batch is run with fewer examples,
    where they do not. The model does not change. Nothing is found in a batch that cannot be cut into examples.
    """
    index = next((index for index, batch in enumerate(batches) if is_square(batch)), None)
    if index is None:
        return frozenset()
    count = max(set(range(1, examples_in(batches[index]))) - lengths_in(batches[index]), default=1)
    with torch.no_grad(), eval_mode(model), reading(model, batches[index], index):
        part, _ = readable_part(model, batches[index], count)
        return turned_in(model, part)


def turned_in(model: nn.Module, batch: Batch) -> frozenset[nn.Module]:
    """The modules that take states with positions first in one run, as their shapes tell."""
    found: set[nn.Module] = set()

    def note(module: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> None:
        states = (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.is_floating_point())
        if (first := next(states, None)) is not None and has_positions_first(first, batch):
            found.add(module)

    run_noting(model, batch, model.modules(), note)
    return frozenset(found)
