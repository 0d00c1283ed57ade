"""The module that replaces one whose weight has no effect any more, because its layer reuses what a layer below computes."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float, Shaped
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hpr.nn.bank import FactorBank
from hpr.nn.site import SharedSite


class ZeroOutput(SharedSite):
    """x (…, in) → zeros (…, out), ids (…) → zeros (…, d), without a multiply; any other module, like a norm, lets x pass."""

    def __init__(self, bank: FactorBank, source: nn.Module, path: str):
        super().__init__(bank, (), source, path)

    @staticmethod
    def sizes(source: nn.Module) -> tuple[int, int]:
        """(out, in) of the weight replaced; 0 and 0 for a module that lets its input pass."""
        return SharedSite.sizes(source) if isinstance(source, nn.Linear | Conv1D | nn.Embedding) else (0, 0)

    def forward(self, x: Shaped[Tensor, "*batch in"], *others: Any, **named: Any) -> Float[Tensor, "*batch out"]:
        if isinstance(self.template, nn.Embedding):
            return self.weight.new_zeros(()).expand(*x.shape, self.in_features)
        return x.new_zeros(()).expand(*x.shape[:-1], self.out_features) if self.out_features else x
