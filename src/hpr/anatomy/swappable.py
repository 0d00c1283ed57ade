"""Which modules can be replaced by ones that read factors, found in their code, and why others cannot."""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from hpr.anatomy.fused_experts import Slice
from hpr.anatomy.lookup import module_at, slice_at
from hpr.anatomy.model import Anatomy
from hpr.errors import HprError


def check_experts(model: nn.Module, path: str, expert: Slice) -> None:
    """Raise ``HprError`` where a module of experts cannot be replaced."""
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


def unshareable(model: nn.Module, anatomy: Anatomy) -> dict[str, str]:
    """Site name → why it has to be kept: its module cannot be replaced, or it is a table that is not of hidden states."""
    reasons: dict[str, str] = {}
    read_by_linears = {site.in_features for site in anatomy.sites if site.kind == "linear"}
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
        except HprError as error:
            reasons[site.name] = str(error)
    return reasons


def check_site(model: nn.Module, path: str) -> None:
    """Raise ``HprError`` where the module or expert at a path cannot be replaced."""
    expert = slice_at(model, path)
    if expert is None:
        check_replaceable(model, path, module_at(model, path))
    else:
        check_experts(model, path, expert)
        _check_read_past(model, path, expert.module, expert.parameter)


def check_replaceable(model: nn.Module, path: str, module: nn.Module) -> None:
    """Raise where a swap would compute something else."""
    mend = "plan to keep it (`only=` leaves it out)"
    kind = type(module)
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            raise HprError(f"{path} renormalises its rows (max_norm), which factors cannot: {mend}")
        if kind.forward is not nn.Embedding.forward and not _delegates(kind):
            raise HprError(f"{path} is a {kind.__name__}, which reads its whole table instead of looking up rows: {mend}")
    elif not isinstance(module, nn.Linear | Conv1D):
        raise HprError(f"{path} is a {kind.__name__}, neither Linear, Conv1D nor Embedding: {mend}")
    elif kind.forward not in (nn.Linear.forward, Conv1D.forward):
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
    """Names of children whose parameter a class reads itself, for more than its dtype: torch's MultiheadAttention does."""
    found = set()
    for owner in kind.__mro__:
        for name, function in vars(owner).items():
            if name in _NO_COMPUTATION or not inspect.isfunction(function):
                continue
            steps = [step.argval for step in dis.get_instructions(inspect.unwrap(function))]
            for place in range(len(steps) - 4):
                origin, child, weight, *after = steps[place : place + 5]
                harmless = after[0] in ("dtype", "device", "shape") or after == ["torch", "Tensor"]  # the last: isinstance
                if origin == "self" and weight == parameter and not harmless:
                    found.add(child)
    return frozenset(found)


def _delegates(kind: type[nn.Module]) -> bool:
    """Whether every forward between a class and ``nn.Embedding`` hands over to the next and reads no weights itself.

    ``self.weight.dtype`` is harmless, since a shared module has that too.
    """
    for owner in kind.__mro__[: kind.__mro__.index(nn.Embedding)]:
        if "forward" not in vars(owner):
            continue
        steps = [step.argval for step in dis.get_instructions(inspect.unwrap(vars(owner)["forward"]))]
        after_weight = [step for weight, step in itertools.pairwise(steps) if weight == "weight"]
        if "super" not in steps or not {"dtype", "device"}.issuperset(after_weight):
            return False
    return True
