"""What a trial of a symmetry runs: the whole model on a batch, or one block on the inputs that it has in such a pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import recursively_apply
from torch import Tensor, nn

from hpr.errors import HprError
from hpr.profiling.first_pass import REFUSALS
from hpr.runtime.torch_errors import does_not_fit


@dataclass
class TrialPass:
    """A call that can be repeated, and all floating-point numbers of its outputs as it gives them before any trial."""

    call: Callable[[], Any]
    expected: Tensor

    def outputs(self) -> Tensor:
        """The floating-point numbers of the outputs now, one vector in float64."""
        return _numbers(self.call())


def repeatable(call: Callable[[], Any]) -> TrialPass | None:
    """The pass of a call; None if two calls differ, or give no floating-point number. An error of the call is not caught."""
    expected = _numbers(call())
    return TrialPass(call, expected) if expected.numel() and torch.equal(expected, _numbers(call())) else None


def of_block(block: nn.Module, run_model: Callable[[], Any]) -> TrialPass | None:
    """The pass of a block alone, on the arguments of its first call by the model.

    None if the model does not call it, or if it cannot be called again by itself: it may count its calls, or fill a cache.
    """
    calls: list[tuple[Any, Any]] = []

    def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
        if not calls:
            calls.append((_copied(args), _copied(kwargs)))

    handle = block.register_forward_pre_hook(note, with_kwargs=True)
    try:
        run_model()
    finally:
        handle.remove()
    if not calls:
        return None
    args, kwargs = calls[0]
    try:
        return repeatable(lambda: block(*_copied(args), **_copied(kwargs)))
    except REFUSALS as error:
        if isinstance(error, HprError) or (isinstance(error, RuntimeError) and not does_not_fit(error)):
            raise  # lack of memory, and faults of a device
        return None


def _copied(arguments: Any) -> Any:
    """The same arguments with tensors of their own, since some blocks write into those that they get."""
    return recursively_apply(torch.clone, arguments)


def _numbers(outputs: Any) -> Tensor:
    floats = [part.double().flatten() for part in _tensors(outputs) if part.is_floating_point()]
    return torch.cat(floats) if floats else torch.empty(0)


def _tensors(outputs: Any) -> Iterator[Tensor]:
    if isinstance(outputs, Tensor):
        yield outputs
    elif isinstance(outputs, Mapping | tuple | list):
        for part in outputs.values() if isinstance(outputs, Mapping) else outputs:
            yield from _tensors(part)
