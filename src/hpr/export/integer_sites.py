"""Let the modules of a coded model compute with its integers. Each stays an instance of its class, as in ``nn.integers``."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hpr.anatomy.lookup import has_module, module_at, readers_of_weights
from hpr.coding.codes import Codes, Product
from hpr.export.integer_modules import (
    IntegerProduct,
    IntegerTable,
    LowRankIntegerProduct,
    LowRankIntegerTable,
)
from hpr.nn.coded import codes_of

Kind = type[nn.Module]
_CLASSES: dict[tuple[Kind, Kind], Kind] = {}


def use_integers(model: nn.Module, writing: Collection[nn.Module] = ()) -> None:
    """Let the Linears and tables of a coded model compute with its integers, in place.

    ``writing``: the modules that run for one token after the other. What else reads a coded weight (a convolution, fused
    experts) keeps the float one, which a Linear keeps as its ``weight``, too, for whoever reads it.
    """
    readers = readers_of_weights(model)
    for path, coded in codes_of(model).items():
        if not has_module(model, path):  # an expert, which is a slice of a parameter
            continue
        users = readers.get(id(module_at(model, path)._parameters.get("weight")), [])
        if not users or not all(_multiplies(user) or _looks_up(user) for user in users):
            continue
        codes, tied = coded.codes(), any(_looks_up(user) for user in users)
        heads = [user for user in users if not _looks_up(user)]
        product = _product(codes, tied or heads[0] in writing, tied) if heads else None
        table = _table(codes, product) if tied else None
        for user in users:
            looks_up = _looks_up(user)
            user.add_module(*(("table", table) if looks_up else ("product", product)))
            if looks_up:
                del user._parameters["weight"]
            _become(user, _LooksUp if looks_up else _Multiplies)


class _Multiplies(nn.Module):
    """A Linear (or Conv1D) that multiplies by integers. ``weight`` stays the float matrix for whoever reads it."""

    product: nn.Module
    bias: Tensor | None

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        y: Tensor = self.product(x, self.bias)
        return y


class _LooksUp(nn.Module):
    """An embedding table of integers, below the ``forward`` of whichever subclass of ``nn.Embedding`` it is."""

    table: nn.Module
    num_embeddings: int

    def forward(self, ids: Int[Tensor, " *batch"]) -> Float[Tensor, "*batch d"]:
        return self.table(ids)

    @property
    def weight(self) -> Float[Tensor, "n d"]:
        """The whole table, for models that read it without a look-up."""
        return self.table(torch.arange(self.num_embeddings))


def has_integers(model: nn.Module) -> bool:
    """Whether a model's modules compute with integers."""
    return any(isinstance(module, IntegerProduct | IntegerTable) for module in model.modules())


def multiplies_integers(module: nn.Module) -> bool:
    """Whether a module is a Linear (or Conv1D) that multiplies by integers; its float weight is there for others to read."""
    return isinstance(module, _Multiplies)


def _product(codes: Codes | Product, tokens: bool, tied: bool) -> nn.Module:
    kind: Any = LowRankIntegerProduct if isinstance(codes, Product) else IntegerProduct
    product: nn.Module = kind(codes, tokens=tokens, tied=tied)
    return product


def _table(codes: Codes | Product, head: nn.Module | None) -> nn.Module:
    if isinstance(codes, Product):
        return LowRankIntegerTable(codes, head if isinstance(head, LowRankIntegerProduct) else None)
    return IntegerTable(codes, head=head if isinstance(head, IntegerProduct) else None)


def _multiplies(module: nn.Module) -> bool:
    return type(module).forward in (nn.Linear.forward, Conv1D.forward)


def _looks_up(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding) and module.max_norm is None


def _become(module: nn.Module, reader: Kind) -> None:
    """Give a module the ``forward`` of a reader. A table's own ``forward`` stays, above that of the reader."""
    kind = type(module)
    if (kind, reader) not in _CLASSES:
        above = (kind, reader) if reader is _LooksUp and kind is not nn.Embedding else (reader, kind)
        _CLASSES[kind, reader] = type(f"Integer{kind.__name__}", above, {"__module__": __name__})
    module.__class__ = _CLASSES[kind, reader]
