"""Whether a module does with its weight what ``nn.Linear`` does, found by running it: a subclass may write the product out."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

_PLAIN = (nn.Linear.forward, Conv1D.forward)
_OTHERS = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, NotImplementedError, AssertionError)
_known: dict[tuple[object, ...], bool] = {}


def multiplies(module: nn.Module) -> bool:
    """Whether a Linear or Conv1D, or a subclass, gives F.linear(x, weight, bias) for its one input.

    A forward of its own is run on random numbers in place of the weights, once for each class and shape.
    """
    kind = type(module)
    if kind.forward in _PLAIN:
        return True
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    if weight is None or weight.dim() != 2:
        return False
    key = (kind, tuple(weight.shape), bias is None, tuple(sorted(module._parameters)))
    if key not in _known:
        _known[key] = _runs_as_linear(module, weight, bias)
    return _known[key]


def _runs_as_linear(module: nn.Module, weight: Tensor, bias: Tensor | None) -> bool:
    draw = torch.Generator().manual_seed(0)
    twin = copy.copy(module)  # its parameters may be on the meta device
    twin._parameters = {
        name: None if own is None else nn.Parameter(torch.randn(own.shape, generator=draw), requires_grad=False)
        for name, own in module._parameters.items()
    }
    twin.training = False
    matrix, offset = twin._parameters["weight"], twin._parameters["bias"] if bias is not None else None
    assert matrix is not None
    weights: Tensor = matrix.T if isinstance(module, Conv1D) else matrix
    for shape in ((3, weights.shape[1]), (2, 5, weights.shape[1])):
        x = torch.randn(shape, generator=draw)
        try:
            found = type(module).forward(twin, x)  # type: ignore[operator]
        except _OTHERS:  # it wants other inputs
            return False
        expected = F.linear(x, weights, offset)
        if not isinstance(found, Tensor) or found.shape != expected.shape:
            return False
        if not torch.allclose(found.float(), expected, rtol=1e-4, atol=1e-3):
            return False
    return True
