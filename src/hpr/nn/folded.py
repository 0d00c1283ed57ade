"""A Linear of low rank as two plain Linears, with the names by which other tools find Linears."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hpr.anatomy.lookup import base_of, has_module, module_at, weight_of
from hpr.errors import CheckpointError


class FoldedLinear(nn.Module):
    """y = U V x + bias. ``inner`` holds V (rank, in); the Linear with U (out, rank) and the bias has the site's last name.

    Tools that look for ``query`` by the end of a module's path have to find a Linear there: PEFT refuses any other module. So
    the Linear is called ``query.query``, and this module leaves itself out of ``named_modules``.
    """

    def __init__(self, inner: nn.Linear, outer: nn.Linear, name: str):
        super().__init__()
        self.last = "outer" if name == "inner" else name
        self.inner = inner
        self.add_module(self.last, outer)

    @property
    def outer(self) -> nn.Module:
        """What holds U: a Linear, or what another tool put in its place."""
        return self.get_submodule(self.last)

    @property
    def weight(self) -> Tensor:
        """U, for models that look at the dtype of a module's weight."""
        return self.outer.weight  # type: ignore[return-value]

    @property
    def rank(self) -> int:
        return int(self.inner.out_features)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        return self.outer(self.inner(x))

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """As in torch, without this module itself."""
        memo = set() if memo is None else memo
        for name, child in self._modules.items():
            if child is not None:
                yield from child.named_modules(memo, f"{prefix}.{name}" if prefix else name, remove_duplicate)


def folded_in(model: nn.Module) -> dict[str, FoldedLinear]:
    """Path, below the base model, → folded Linear."""
    prefix = base_of(model)[1]
    return {
        f"{path}.{name}".removeprefix(".").removeprefix(prefix): child
        for path, parent in model.named_modules()
        for name, child in parent._modules.items()
        if isinstance(child, FoldedLinear)
    }


def attach_folded(model: nn.Module, ranks: Mapping[str, Any]) -> None:
    """Put folded Linears without numbers in the places of Linears, as far as the model has them, before weights are read."""
    for path, rank in ranks.items():
        if not has_module(model, path):
            continue
        source = module_at(model, path)
        if not isinstance(source, nn.Linear | Conv1D) or type(rank) is not int or not 1 <= rank < min(source.weight.shape):
            kind = type(source).__name__
            raise CheckpointError(f"{path} is a {kind}, which cannot be folded to rank {rank!r}: save the model again with hpr")
        out_features, in_features = weight_of(source).shape
        with torch.device(source.weight.device):
            inner = nn.Linear(in_features, rank, bias=False, dtype=source.weight.dtype)
            outer = nn.Linear(rank, out_features, bias=source.bias is not None, dtype=source.weight.dtype)
        replace_module(model, source, FoldedLinear(inner, outer, path.rpartition(".")[2]).train(source.training))


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, wherever that is held."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                setattr(parent, name, new)
