"""Experts that a module stores as slices of one three-dimensional parameter, found by how its code reads them.

If the code has ``F.linear(x, self.up[i])``, then ``up`` holds one matrix (out, in) for each expert. Parameters that are read in
another way (``x @ self.up[i]``: experts stored transposed) are ignored.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor, nn

from hpr.anatomy.source_code import names_in, tree_of


class Slice(NamedTuple):
    """One expert's matrix: slice ``number`` of the parameter ``parameter`` of ``module``."""

    module: nn.Module
    parameter: str
    number: int

    @property
    def weight(self) -> Tensor:
        """(out, in), a view of the parameter."""
        stored: Tensor = getattr(self.module, self.parameter)
        return stored[self.number]


def sliced_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Name and value of the three-dimensional parameters of a module that hold one matrix for each expert."""
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() == 3 and name in _read_by_slices(type(module)):  # type: ignore[arg-type]  # a class is hashable
            yield name, parameter


def slice_below(root: nn.Module, path: str) -> Slice | None:
    """The slice at a path (``mlp.experts.down_proj.3``); None if there is none."""
    rest, _, number = path.rpartition(".")
    owner, _, parameter = rest.rpartition(".")
    try:
        module = root.get_submodule(owner)
    except AttributeError:
        return None
    found = dict(sliced_parameters(module)).get(parameter)
    if found is None or not number.isdigit() or int(number) >= len(found):
        return None
    return Slice(module, parameter, int(number))


@functools.cache
def _read_by_slices(kind: Any) -> frozenset[str]:
    """Attributes P that the forward of a class reads as ``linear(…, self.P[…])``; none if its source is not available."""
    tree = tree_of(kind.forward) if "linear" in names_in(kind.forward) else None
    if tree is None:
        return frozenset()
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and len(node.args) > 1 and ast.unparse(node.func).rpartition(".")[2] == "linear":
            weight = node.args[1]
            if isinstance(weight, ast.Subscript) and ast.unparse(weight.value).startswith("self."):
                found.add(ast.unparse(weight.value).removeprefix("self."))
    return frozenset(found)
