"""Record each use of a weight that module hooks cannot see: look-ups in embedding tables, and products with experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hpr.runtime.hooks import configs_of

_IMPLEMENTATION = "_experts_implementation"  # the setting of a transformers configuration that selects how experts run
Record = Callable[[Tensor, Tensor], None]  # takes the input, and the gradient of the output


class WeightsRead(TorchFunctionMode):
    """Call a function with the input and the output's gradient at each use of a weight.

    ``tables``: id of an embedding parameter → function for its look-ups, and for slices of its rows, as some modules read
    positions. Embedding modules may compute ids or scale rows themselves, so a hook on the module would see other tensors. If
    all examples of a batch share a slice, its gradient is their sum, whose expected outer product is the sum of theirs: the
    draws of different examples are independent. ``experts``: address of the first number of an expert's weight
    → function for its products. Each call makes a new view of the weight, so the id of the view would not identify it.
    """

    def __init__(self, tables: Mapping[int, Record], experts: Mapping[int, Record]):
        super().__init__()
        self.tables = tables
        self.experts = experts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not torch.is_grad_enabled():  # some models look up fixed tables without gradients
            return output
        record, given = None, args[0] if args else None
        if func is F.embedding:
            record = self.tables.get(id(args[1]))
        elif func is Tensor.__getitem__ and not isinstance(args[1], tuple):  # a tuple chooses columns as well
            record = self.tables.get(id(args[0]))
            if record is not None:
                given = torch.arange(len(args[0]), device=args[0].device)[args[1]]
        elif func is F.linear and self.experts and len(args) > 1:
            record = self.experts.get(args[1].data_ptr())
        if record is not None and given is not None:
            callback, given = record, given.detach()
            output = with_graph(output)
            output.register_hook(lambda gradient: callback(given, gradient))
        return output


@contextmanager
def experts_one_by_one(model: nn.Module) -> Iterator[None]:
    """Run each expert by its own ``F.linear``. Other implementations of transformers multiply by all experts at once."""
    chosen = [(config, config._experts_implementation) for config in configs_of(model) if hasattr(config, _IMPLEMENTATION)]
    try:
        for config, _ in chosen:
            config._experts_implementation = "eager"
        yield
    finally:
        for config, name in chosen:  # the public setter would also change nested configurations
            setattr(config, f"{_IMPLEMENTATION}_internal", name)


def with_graph(output: Float[Tensor, ...]) -> Float[Tensor, ...]:
    """Return the output with a graph: itself, or a clone that starts a graph, because += fails on a leaf."""
    return output if output.requires_grad else output.detach().requires_grad_().clone()
