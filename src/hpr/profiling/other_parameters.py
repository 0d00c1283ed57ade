"""How much the loss depends on parameters that are no site's weight: norms, biases, positions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from hpr.anatomy.lookup import weight_at
from hpr.anatomy.model import Anatomy


def other_parameters(model: nn.Module, anatomy: Anatomy) -> dict[str, nn.Parameter]:
    """Name → every floating-point parameter that is no site's weight."""
    sites = {weight_at(model, site).untyped_storage().data_ptr() for site in anatomy.sites}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point() and parameter.numel() and parameter.untyped_storage().data_ptr() not in sites
    }


class Sensitivity:
    """Sums of squared gradients over batches, one mean per parameter.

    The gradient of a batch is a sum over examples whose signs are random, so the expectation of its square is the sum of the
    squares of the examples, which is the diagonal of the Fisher matrix.
    """

    def __init__(self, model: nn.Module, anatomy: Anatomy):
        self.parameters = other_parameters(model, anatomy)
        self.sums: dict[str, Tensor] = {}

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Let backward passes give these parameters a gradient. ``_frozen`` outside restores whether they had one before."""
        kept = {name: parameter.grad for name, parameter in self.parameters.items()}
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
            parameter.grad = None
        try:
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.requires_grad_(False)
                parameter.grad = kept[name]

    def add(self) -> None:
        """Take up the gradients of one batch."""
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                square = parameter.grad.double().square().mean()
                self.sums[name] = self.sums[name] + square if name in self.sums else square
                parameter.grad = None

    def per_example(self, examples: int) -> dict[str, float]:
        """Name → the mean squared gradient of one number, in squared nats per example; 0 without a gradient."""
        return {name: float(self.sums.get(name, 0.0)) / examples for name in self.parameters}
