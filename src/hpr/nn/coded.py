"""The coded weights of a model: its modules stay those of the original, and the streams of bytes are kept beside them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from hpr.anatomy.lookup import base_of, module_at, weight_of
from hpr.coding.record import Coded
from hpr.errors import CheckpointError, HprError

_ATTRIBUTE, _OBJECTIVE = "_hpr_coded", "_hpr_objective"


def attach_codes(model: nn.Module, coded: Mapping[str, Coded], objective: str | None) -> None:
    """Keep the streams of a model's weights with it, by site, and the objective of the profile that they were rounded with.

    They are no parameters, so training does not see them.
    """
    object.__setattr__(model, _ATTRIBUTE, dict(coded))
    object.__setattr__(model, _OBJECTIVE, objective)


def coded_objective(model: nn.Module) -> str | None:
    """The name of the objective that a coded model was rounded for, None if none is recorded."""
    objective: str | None = getattr(model, _OBJECTIVE, None)
    return objective


def codes_of(model: nn.Module) -> dict[str, Coded]:
    """Site → its coded weight; empty for a model that was not rounded."""
    coded: dict[str, Coded] = getattr(model, _ATTRIBUTE, {})
    return coded


def refuse_coded(model: nn.Module, action: str) -> None:
    """Raise ``HprError`` for a coded model, before it is ``action`` (healed, shared): its weights would no longer be codes."""
    if codes_of(model):
        raise HprError(
            f"this {type(model).__name__} is rounded and coded and cannot be {action}: use its original, or hpr.unshare of it"
        )


def stored(tensor: Tensor) -> Tensor:
    """A tensor that is not coded as a checkpoint stores it: in half precision, unless a number would leave its range."""
    if tensor.dtype != torch.float32 or float(tensor.abs().max() if tensor.numel() else 0) > torch.finfo(torch.float16).max:
        return tensor
    return tensor.half()


def coded_state(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint of a coded model holds: a stream of bytes for each coded weight, everything else as ``stored``.

    A tensor that several modules share is stored once. Raises ``CheckpointError`` if a weight is no longer what its stream
    says, because the model was trained after it was rounded.
    """
    streams, others = split_state(model, codes_of(model))
    return {key: _stream(model, path) for key, path in streams.items()} | others


def split_state(model: nn.Module, sites: Collection[str]) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Key in the checkpoint → site of each stream, and the tensors that are not coded, each once."""
    base, prefix = base_of(model)
    inside = {name for name, _ in base.named_modules(remove_duplicate=False)}
    paths = {f"{prefix if path in inside else ''}{path}.weight": path for path in sites}
    streams: dict[str, str] = {}
    others: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    tensors = model.state_dict(keep_vars=True)
    for key in sorted(tensors, key=lambda name: name not in paths):  # the name of a coded weight before its aliases
        tensor = tensors[key].detach()
        place = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        if key in paths:
            streams[key] = paths[key]
        else:
            others[key] = stored(tensor).contiguous()
    return streams, others


def _stream(model: nn.Module, path: str) -> Tensor:
    coded, weight = codes_of(model)[path], weight_of(module_at(model, path))
    if not torch.equal(coded.weight().to(weight), weight):
        raise CheckpointError(
            f"the weight of {path} is not what it was rounded to: the model was changed after it was rounded; round it again"
        )
    return torch.frombuffer(bytearray(coded.stream), dtype=torch.uint8)
