"""Stands where a module stood whose weight has no effect any more, since its layer reuses what one below computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hpr.anatomy import weight_of
from hpr.bank import FactorBank, SharedSite, shell_of


class Vanished(SharedSite):
    """x (…, in) → zeros (…, out), ids (…) → zeros (…, d), without a multiply; anything else, like a norm, lets x pass."""

    def __init__(self, bank: FactorBank, source: nn.Module, path: str):
        nn.Module.__init__(self)
        self._bank = (bank,)
        self._shell = (shell_of(source),)
        self.terms = ()
        self.path = path
        self.out_features, self.in_features = 0, 0
        if isinstance(source, nn.Linear | Conv1D | nn.Embedding):
            self.out_features, self.in_features = weight_of(source).shape
        self.register_buffer("weight", torch.zeros(1, dtype=bank.dtype))
        self.train(source.training)

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        if isinstance(self.shell, nn.Embedding):
            return self.weight.new_zeros(()).expand(*x.shape, self.in_features)
        return x.new_zeros(()).expand(*x.shape[:-1], self.out_features) if self.out_features else x
