"""Which modules can be replaced by modules that read shared factors, and why others cannot. Found in their code."""

from __future__ import annotations

import ast
import functools
import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from hpr.anatomy.fused_experts import Slice
from hpr.anatomy.lookup import module_at, slice_at
from hpr.anatomy.model import Anatomy, Site
from hpr.anatomy.multiplies import multiplies
from hpr.anatomy.source_code import attribute_of_self, functions_of, names_in, tree_of
from hpr.errors import HprError

_log = logging.getLogger(__name__)


def check_experts(model: nn.Module, path: str, expert: Slice) -> None:
    """Raise ``HprError`` if a module of experts cannot be replaced."""
    parameter = getattr(expert.module, expert.parameter)
    for module in model.modules():
        if module is not expert.module and any(own is parameter for own in module._parameters.values()):
            raise HprError(
                f"{path} is read by two modules, {type(expert.module).__name__} and {type(module).__name__}: "
                f"plan to keep it (`only=` leaves it out)"
            )


_NO_COMPUTATION = (
    "__init__",
    "_init_weights",
    "_reset_parameters",
    "reset_parameters",
    "tie_weights",
)  # read no weights to use


def not_swappable(model: nn.Module, anatomy: Anatomy) -> dict[str, str]:
    """Site name → why it must be kept: its module cannot be replaced, or it is a table whose rows are no hidden states.

    Sites that may be replaced are not listed.
    """
    reasons: dict[str, str] = {}
    read_by_linears = {site.in_features for site in anatomy.sites if site.kind == "linear"}
    holders: dict[int, list[tuple[str, nn.Module]]] = defaultdict(list)
    for path, module in model.named_modules():
        for own in module._parameters.values():
            holders[id(own)].append((path, module))
    all_frozen = not any(parameter.requires_grad for parameter in model.parameters())
    for site in anatomy.sites:
        if site.kind == "embedding":
            if site.in_features not in read_by_linears:
                reasons[site.name] = f"{site.name} has rows that no Linear reads, like a table of relative positions: it stays"
            elif not (all_frozen or module_at(model, site.name).weight.requires_grad):
                reasons[site.name] = f"{site.name} is a fixed table (it takes no gradient): it stays"
        try:
            for path in (site.name, *site.aliases):
                check_site(model, path)
            if site.expert is None:
                _check_holders(model, site, holders)
        except HprError as error:
            reasons[site.name] = str(error)
    return reasons


def _check_holders(model: nn.Module, site: Site, holders: Mapping[int, Sequence[tuple[str, nn.Module]]]) -> None:
    """Raise ``HprError`` if a module of another kind holds the weight of a site as well, such as a table that is quantised."""
    for path, module in holders[id(module_at(model, site.name).weight)]:
        check_replaceable(model, path, module)


def check_site(model: nn.Module, path: str) -> None:
    """Raise ``HprError`` if the module or expert at a path cannot be replaced."""
    expert = slice_at(model, path)
    if expert is None:
        check_replaceable(model, path, module_at(model, path))
    else:
        check_experts(model, path, expert)
        _check_read_past(model, path, expert.module, expert.parameter)


def check_replaceable(model: nn.Module, path: str, module: nn.Module) -> None:
    """Raise ``HprError`` if a shared module in its place would compute something else."""
    mend = "plan to keep it (`only=` leaves it out)"
    kind = type(module)
    if isinstance(module, nn.Embedding):
        if any(True for _ in module.children()):
            raise HprError(f"{path} is a {kind.__name__} with modules of its own, which a shared table has not: {mend}")
        if module.max_norm is not None:
            raise HprError(f"{path} renormalises its rows (max_norm), which factors cannot: {mend}")
        if kind.forward is not nn.Embedding.forward and not _delegates(kind):
            raise HprError(f"{path} is a {kind.__name__}, which reads its whole table instead of looking up rows: {mend}")
    elif not isinstance(module, nn.Linear | Conv1D):
        raise HprError(f"{path} is a {kind.__name__}, neither Linear, Conv1D nor Embedding: {mend}")
    elif not multiplies(module):
        raise HprError(f"{path} is a {kind.__name__} with a forward of its own: {mend}")
    _check_read_past(model, path, module, "weight")


def _check_read_past(model: nn.Module, path: str, module: nn.Module, parameter: str) -> None:
    for parent in model.modules():
        for name in _read_past(type(parent), parameter):  # type: ignore[arg-type]  # a class is hashable
            if parent._modules.get(name) is module:
                raise HprError(
                    f"{path} belongs to a {type(parent).__name__}, which reads its weight past the module: "
                    f"plan to keep it (`only=` leaves it out)"
                )


@functools.cache
def _read_past(kind: Any, parameter: str) -> frozenset[str]:
    """Names of children whose parameter a class reads itself, for more than its dtype: torch's MultiheadAttention does.

    If the source of a method cannot be found, every child that the method mentions beside the parameter counts as read: a site
    is then kept without need at worst, never replaced by mistake.
    """
    children: set[str | None] = set()
    for name, function in functions_of(kind):
        if name in _NO_COMPUTATION or parameter not in names_in(function):
            continue
        tree = tree_of(function)
        if tree is None:
            _log.debug("%s.%s: children that it mentions beside %r are kept", kind.__qualname__, name, parameter)
            children |= names_in(function)
            continue
        harmless = _harmless(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == parameter and node not in harmless:
                children.add(attribute_of_self(node.value))
    return frozenset(child for child in children if child is not None)


def _harmless(tree: ast.AST) -> set[ast.AST]:
    """Nodes of whose value only the type or device is asked: ``x`` in ``x.dtype`` and in ``isinstance(x, Tensor)``.

    A shape is more: that of a placeholder is another.
    """
    found: set[ast.AST] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("dtype", "device"):
            found.add(node.value)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "isinstance":
            found.add(node.args[0])
    return found


def _delegates(kind: type[nn.Module]) -> bool:
    """Whether every forward between a class and ``nn.Embedding`` calls the next one and reads no weights itself.

    ``self.weight.dtype`` is harmless, because a shared module has that too. False if the source is needed and not found.
    """
    for owner in kind.__mro__[: kind.__mro__.index(nn.Embedding)]:
        forward = vars(owner).get("forward")
        if forward is None:
            continue
        names = names_in(forward)
        if "super" not in names:
            return False
        if "weight" in names:
            tree = tree_of(forward)
            if tree is None:
                return False
            attributes = [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
            harmless = {node.value for node in attributes if node.attr in ("dtype", "device")}
            if any(node.attr == "weight" and node not in harmless for node in attributes):
                return False
    return True
