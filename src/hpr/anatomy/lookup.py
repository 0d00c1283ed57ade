"""Find a site in a model: its module and its weight."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hpr.anatomy.fused_experts import Slice, slice_below
from hpr.anatomy.model import Site
from hpr.errors import HprError


def base_of(model: nn.Module) -> tuple[nn.Module, str]:
    """The base model below a task head and its prefix (``bert.``); the model itself and '' if it has no head."""
    prefix = getattr(model, "base_model_prefix", "")
    base = getattr(model, prefix, None) if prefix else None
    return (base, f"{prefix}.") if isinstance(base, nn.Module) else (model, "")


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module at a path below the base model, else below the whole model. Raises ``HprError`` if there is none."""
    base, _ = base_of(model)
    for root in (base, model):
        try:
            return root.get_submodule(path)
        except AttributeError:
            continue
    raise HprError(f"{type(model).__name__} has no module {path!r}: the plan or checkpoint is of another model")


def has_module(model: nn.Module, path: str) -> bool:
    """Whether there is a module at a path."""
    try:
        module_at(model, path)
    except HprError:
        return False
    return True


def bytes_per_parameter(model: nn.Module) -> float:
    """The mean size of a unique parameter in bytes: 4.0 for float32, 2.0 for bfloat16, between them for a mixture.

    Raises ``HprError`` for a model without parameters.
    """
    parameters = list(model.parameters())
    if not (count := sum(parameter.numel() for parameter in parameters)):
        raise HprError(f"{type(model).__name__} has no parameters: give a model with weights")
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters) / count


def weight_of(module: nn.Module) -> torch.Tensor:
    """The weight of a module as (out, in), also if it is stored as (in, out); a view, never a copy."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    return weight.T if isinstance(module, Conv1D) else weight


def readers_of_weights(model: nn.Module) -> dict[int, list[nn.Module]]:
    """``id`` of a parameter that is a module's ``weight`` → all modules that have it; a tied one has several."""
    readers: dict[int, list[nn.Module]] = {}
    for module in model.modules():
        if (weight := module._parameters.get("weight")) is not None:
            readers.setdefault(id(weight), []).append(module)
    return readers


def weight_at(model: nn.Module, site: Site) -> torch.Tensor:
    """The weight of a site as (out, in), a view of the parameter. Raises ``HprError`` if the model has no such site."""
    if site.expert is not None and slice_at(model, site.name) is None:
        raise HprError(f"{type(model).__name__} has no experts at {site.name!r}: the plan or checkpoint is of another model")
    return weight_named(model, site.name)


def weight_named(model: nn.Module, path: str) -> torch.Tensor:
    """The weight at the path of a site, that of a module or of an expert. Raises ``HprError`` if there is none."""
    found = slice_at(model, path)
    return weight_of(module_at(model, path)) if found is None else found.weight


def slice_at(model: nn.Module, path: str) -> Slice | None:
    """The expert at a path below the base model or the whole model; None if the path is not that of an expert."""
    return slice_below(base_of(model)[0], path) or slice_below(model, path)
