"""The coded weights of a model: its modules stay those of the original, and the streams of bytes are kept beside them.

In a file every large weight has a stream under its own name. Everything else is packed together, under the name of the first
tensor in the pack: a loader that knows nothing of hpr finds a tensor of another shape there, which is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hpr.anatomy.lookup import base_of, module_at, weight_of
from hpr.coding.codes import Codes, Product
from hpr.coding.pack import Pack
from hpr.coding.record import Coded
from hpr.errors import CheckpointError, HprError

_ATTRIBUTE, _OTHERS, _OBJECTIVE = "_hpr_coded", "_hpr_other_codes", "_hpr_objective"
_PACKED_BELOW = 1 << 17  # numbers; a larger tensor is worth a name and probability tables of its own


def attach_codes(
    model: nn.Module, coded: Mapping[str, Coded], objective: str | None, others: Mapping[str, Codes] | None = None
) -> None:
    """Keep the streams of a model's weights with it, by site, and the objective of the profile that they were rounded with.

    ``others``: name → codes of parameters beside the sites, such as norms. All of these are no parameters, so training does
    not see them.
    """
    object.__setattr__(model, _ATTRIBUTE, dict(coded))
    object.__setattr__(model, _OTHERS, dict(others or {}))
    object.__setattr__(model, _OBJECTIVE, objective)


def coded_objective(model: nn.Module) -> str | None:
    """The name of the objective that a coded model was rounded for, None if none is recorded."""
    objective: str | None = getattr(model, _OBJECTIVE, None)
    return objective


def codes_of(model: nn.Module) -> dict[str, Coded]:
    """Site → its coded weight; empty for a model that was not rounded."""
    coded: dict[str, Coded] = getattr(model, _ATTRIBUTE, {})
    return coded


def other_codes_of(model: nn.Module) -> dict[str, Codes]:
    """Name → codes of the parameters beside the sites that were rounded, too."""
    others: dict[str, Codes] = getattr(model, _OTHERS, {})
    return others


def refuse_coded(model: nn.Module, action: str) -> None:
    """Raise ``HprError`` for a coded model, before it is ``action`` (healed, shared): its weights would no longer be codes."""
    if codes_of(model):
        raise HprError(
            f"this {type(model).__name__} is rounded and coded and cannot be {action}: use its original, or hpr.unshare of it"
        )


def in_pack(numbers: int) -> bool:
    """Whether a tensor of so many numbers lies in the pack of a coded file; a larger one is a tensor of the file."""
    return numbers < _PACKED_BELOW


def stored(tensor: Tensor) -> Tensor:
    """A tensor that is not coded as a checkpoint stores it: in half precision, unless a number would leave its range."""
    if tensor.dtype != torch.float32 or float(tensor.abs().max() if tensor.numel() else 0) > torch.finfo(torch.float16).max:
        return tensor
    return tensor.half()


@dataclass(frozen=True)
class CodedState:
    """What a checkpoint of a coded model holds.

    ``tensors``: key → tensor; streams and the pack are uint8. ``streams``: the keys of large weights by site. ``pack``: the
    key of the pack, if there is one.
    """

    tensors: dict[str, Tensor]
    streams: dict[str, str]
    pack: str | None


def coded_state(model: nn.Module) -> CodedState:
    """What a checkpoint of a coded model holds; a tensor that several modules share is stored once.

    Raises ``CheckpointError`` if a weight is no longer what its codes say, because the model was trained after it was rounded.
    """
    coded, others = codes_of(model), other_codes_of(model)
    for path, record in coded.items():
        weight = weight_of(module_at(model, path))
        _check(path, record.weight().to(weight), weight)
    parameters = dict(model.named_parameters())
    for name, codes in others.items():
        _check(name, codes.weight().to(parameters[name]).view_as(parameters[name]), parameters[name])
    return state_of(model, coded, others)


def state_of(model: nn.Module, coded: Mapping[str, Coded], others: Mapping[str, Codes]) -> CodedState:
    """The same for codes that are not yet in the model: tensors without codes are those of ``model``."""
    base, prefix = base_of(model)
    inside = {name for name, _ in base.named_modules(remove_duplicate=False)}
    sites = {f"{prefix if path in inside else ''}{path}.weight": path for path in coded}
    weights: dict[str, Codes | Product] = {}
    rest: dict[str, Codes] = {}
    plain: dict[str, Tensor] = {}
    large: dict[str, Tensor] = {}
    streams: dict[str, str] = {}
    seen: set[tuple[int, torch.Size]] = set()
    tensors = model.state_dict(keep_vars=True)
    for key in sorted(tensors, key=lambda name: name not in sites and name not in others):  # coded names before their aliases
        tensor = tensors[key].detach()
        place = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        if key in sites and not in_pack(tensor.numel()):
            large[key] = torch.frombuffer(bytearray(coded[sites[key]].stream), dtype=torch.uint8)
            streams[sites[key]] = key
        elif key in sites:
            weights[key] = coded[sites[key]].codes()
        elif key in others:
            rest[key] = others[key]
        elif in_pack(tensor.numel()):
            plain[key] = stored(tensor)
        else:
            large[key] = stored(tensor).contiguous()
    together = {*weights, *rest, *plain}
    names = [key for key in tensors if key in together]
    if not names:
        return CodedState(large, streams, None)
    first = next((key for key in names if key.startswith(prefix)), names[0])  # every class of this model has it
    packed = torch.frombuffer(bytearray(Pack(weights, rest, plain).to_bytes()), dtype=torch.uint8)
    packed = packed[None] if tensors[first].dim() == 1 else packed  # never of the tensor's own shape
    return CodedState(large | {first: packed}, streams, first)


def _check(name: str, expected: Tensor, found: Tensor) -> None:
    if not torch.equal(expected, found):
        raise CheckpointError(
            f"{name} is not what it was rounded to: the model was changed after it was rounded; round it again"
        )
