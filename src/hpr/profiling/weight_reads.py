"""Weights as they are read: look-ups in tables and products with experts, where no module's hook could watch them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_IMPLEMENTATION = "_experts_implementation"  # how a transformers configuration names the way experts are run
Record = Callable[[Tensor, Tensor], None]  # takes what was put in, and the gradient of what came out


class WeightsRead(TorchFunctionMode):
    """Calls back with the input and the output's gradient of each use of a weight.

    ``tables``: id of a parameter → for its look-ups (embedding modules compute ids or scale rows themselves, so that their
    hooks would see something else). ``experts``: address of a slice's first number → for its products: each call takes a new
    view of the slice, which has no identity.
    """

    def __init__(self, tables: Mapping[int, Record], experts: Mapping[int, Record]):
        super().__init__()
        self.tables = tables
        self.experts = experts

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not torch.is_grad_enabled():  # some models look up fixed tables without gradients
            return output
        record = None
        if func is F.embedding:
            record = self.tables.get(id(args[1]))
        elif func is F.linear and self.experts and len(args) > 1:
            record = self.experts.get(args[1].data_ptr())
        if record is not None:
            found, given = record, args[0].detach()
            output = with_graph(output)
            output.register_hook(lambda gradient: found(given, gradient))
        return output


@contextmanager
def experts_one_by_one(model: nn.Module) -> Iterator[None]:
    """Experts run by one ``F.linear`` each: transformers' other implementations multiply by all of them at once."""
    configs = {id(config): config for module in model.modules() if (config := getattr(module, "config", None)) is not None}
    chosen = [(config, config._experts_implementation) for config in configs.values() if hasattr(config, _IMPLEMENTATION)]
    try:
        for config, _ in chosen:
            config._experts_implementation = "eager"
        yield
    finally:
        for config, name in chosen:  # past the setter, which would also set the configurations inside
            setattr(config, f"{_IMPLEMENTATION}_internal", name)


def with_graph(output: Tensor) -> Tensor:
    """The output itself, or where nothing below has a graph, one that starts here; cloned so that += stays legal."""
    return output if output.requires_grad else output.detach().requires_grad_().clone()
