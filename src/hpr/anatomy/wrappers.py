"""Take a model out of wrappers that change nothing that it computes, and refuse those that do or that hold no plain weights."""

from __future__ import annotations

import copy
import functools
import types
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hpr.errors import HprError, check_kind

_INNER = {  # wrappers of torch, and where each keeps the model
    "DataParallel": "module",
    "DistributedDataParallel": "module",
    "AveragedModel": "module",
    "OptimizedModule": "_orig_mod",
}
_REFUSED = {  # the package or class that a module comes from: what the model is, and the mend
    "sentence_transformers": (
        "a model of sentence-transformers, which holds more than its Transformer",
        "save it with save_pretrained(folder), and give the folder",
    ),
    "peft": ("adapted by PEFT", "merge it first, model = model.merge_and_unload()"),
    "deepspeed": ("divided by DeepSpeed", "gather them, and give the model inside"),
    "FSDPModule": ("sharded by fully_shard", "give the model before fully_shard, with all its weights"),
    "FullyShardedDataParallel": ("sharded by FSDP", "gather the full state, and give the model that it belongs to"),
    "ScriptModule": ("compiled by torch.jit", "give the module that was scripted or traced"),
}
_QUANTISED = (
    *("torch.ao.nn", "torchao", "bitsandbytes", "quanto", "optimum", "hqq", "awq", "auto_gptq", "gptqmodel"),
    *("compressed_tensors", "aqlm", "eetq", "transformers.integrations"),
)
_ORIGINAL = "give the original in floating point"


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DataParallel, DistributedDataParallel, AveragedModel and torch.compile; any other stays as it is.

    The caller's module does not change. Raises ``HprError`` for a model that cannot be taken out, or has no plain weights: one
    that is sharded, scripted, adapted by PEFT, offloaded or quantised; and for what is no module.
    """
    model = inside(model)
    if model._compiled_call_impl is not None or _compiled(vars(model).get("forward")):
        model = copy.copy(model)  # the same weights and modules; a copy leaves out what compile() has set
        vars(model).pop("forward", None)
    for path, module in model.named_modules():
        _check_module(model, path, module)
    for name, parameter in model.named_parameters():
        _check_parameter(model, name, parameter)
    return model


def inside(model: nn.Module) -> nn.Module:
    """The same without any check of the module: a model that is run as it is may be of any kind."""
    check_kind("the model", model, nn.Module, "a torch.nn.Module, such as what hpr.share or from_pretrained returns")
    while (inner := _inner(model)) is not None:
        model = inner
    return model


def _inner(model: nn.Module) -> nn.Module | None:
    for kind in type(model).__mro__:
        if kind.__name__ in _INNER and kind.__module__.startswith("torch."):
            return model.get_submodule(_INNER[kind.__name__])
    return None


def _compiled(forward: Any) -> bool:
    return hasattr(forward, "_torchdynamo_orig_callable")


def _check_module(model: nn.Module, path: str, module: nn.Module) -> None:
    where = f"{path} ({type(module).__name__}) in this {type(model).__name__}" if path else f"this {type(model).__name__}"
    for kind in type(module).__mro__:
        for name in (kind.__module__.partition(".")[0], kind.__name__):
            if name in _REFUSED:
                what, mend = _REFUSED[name]
                raise HprError(f"{where} is {what}: {mend}")
    home = type(module).__module__
    stores = "weight" in module._parameters or home.startswith("hpr.")  # hpr's own modules read the bank
    if isinstance(module, nn.Linear | nn.Embedding | Conv1D) and not stores:
        raise HprError(
            f"{where} computes its weight from {', '.join(_parts(module))}, so its weight cannot be replaced: make it a plain "
            f"parameter first ({_remedy(module)})"
        )
    if any(home == package or home.startswith(f"{package}.") for package in _QUANTISED):
        raise HprError(f"{where} is quantised (a class of {home}): {_ORIGINAL}")
    if getattr(module, "_hf_peft_config_loaded", False):
        raise HprError(f"{where} is {_REFUSED['peft'][0]}: merge it first, or call delete_adapter")
    if _inner(module) is not None or module._compiled_call_impl is not None:
        raise HprError(f"{where} is compiled or wrapped inside the model: give the model as it was before")
    if not _own(module, vars(module).get("forward")):
        raise HprError(
            f"{where} has a function in place of its forward, which copies of the model would share: give the model as it was "
            f"before, or set the function with types.MethodType"
        )


def _parts(module: nn.Module) -> list[str]:
    """The names of the parameters and buffers that a weight is computed from, below its module."""
    named = (*module.named_parameters(), *module.named_buffers())
    return [name for name, _ in named if not name.startswith("bias")] or ["elsewhere"]


def _remedy(module: nn.Module) -> str:
    """The function of torch that makes a computed weight a plain one."""
    if "weight" in getattr(module, "parametrizations", {}):
        return "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')"
    if hasattr(module, "weight_mask"):
        return "torch.nn.utils.prune.remove(module, 'weight')"
    return "torch.nn.utils.remove_weight_norm(module) or remove_spectral_norm(module)"


def _own(module: nn.Module, forward: Any) -> bool:
    """Whether a forward that was set on a module goes along when the module is copied."""
    if isinstance(forward, types.MethodType):
        return forward.__self__ is module
    if isinstance(forward, functools.partial):  # as the hooks of accelerate are set
        return any(value is module for value in forward.args)
    return not isinstance(forward, types.FunctionType)


def _check_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    where = f"this {type(model).__name__} has {name}"
    data: Tensor = parameter.data
    if type(data) is not Tensor:
        raise HprError(f"{where} as a {type(data).__name__}, no plain tensor (sharded or quantised): {_ORIGINAL}")
    if data.element_size() == 1:
        raise HprError(f"{where} as {data.dtype}, which is quantised: {_ORIGINAL}")
    if data.layout != torch.strided:
        raise HprError(f"{where} as a sparse tensor ({data.layout}): call to_dense() on it")
    if data.is_meta and any(hasattr(module, "_hf_hook") for module in model.modules()):
        raise HprError(f"{where} offloaded by accelerate: load the model without device_map, or with device_map='cpu'")
