"""Training on several processes: sharding, whole weights, and values that all processes agree on."""

from __future__ import annotations

from typing import TypeVar

import torch
import transformers
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, Trainer

from hpr.anatomy.lookup import has_module, module_at
from hpr.anatomy.model import Anatomy
from hpr.errors import HprError


def shard(model: nn.Module, anatomy: Anatomy, device: torch.device) -> nn.Module:
    """Shard a model in place over all processes, and return it. ``anatomy``: that of the original.

    Raises ``HprError`` if there is one process alone, and if transformers is too old to train a model that it did not shard.
    """
    if not torch.distributed.is_initialized():
        raise HprError("sharded=True needs several processes: start with torchrun or accelerate launch")
    if not hasattr(Trainer, "_sync_replicated_trainable_parameters"):
        raise HprError(f"sharded=True needs transformers 5.23 or later, this is {transformers.__version__}: upgrade it")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for path in anatomy.blocks:
        if has_module(model, path) and any(True for _ in module_at(model, path).parameters()):
            fully_shard(module_at(model, path), mesh=mesh)
    fully_shard(model, mesh=mesh)
    # transformers sets this flag on models that it shards on loading: the Trainer then does not wrap them again
    name = "is_distributed_loading_by_transformers"
    setattr(model, f"_{name}" if isinstance(model, PreTrainedModel) else name, True)
    return model


def whole(value: Tensor) -> Tensor:
    """Return a tensor, gathered if it is sharded. Every process has to call this."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return the unsharded state of a sharded model on every process, on the CPU."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = agreed(get_model_state_dict(model, options=options))  # cpu_offload gives them to the first process alone
    return {name: value for name, value in weights.items() if isinstance(value, Tensor)}


T = TypeVar("T")


def agreed(value: T) -> T:
    """Return the value of the first process, on every process."""
    values = [value]
    broadcast_object_list(values)
    return values[0]
