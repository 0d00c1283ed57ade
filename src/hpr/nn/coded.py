"""The coded weights of a model: its modules stay those of the original, and the streams of bytes are kept beside them.

In a file every large weight has a stream under its own name; a parameter whose slices are experts has one for each of them.
Everything else is packed together, under the name of the first tensor in the pack: a loader that knows nothing of hpr finds a
tensor of another shape there, which is an error.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hpr.anatomy.lookup import base_of, slice_at, weight_named
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

    ``tensors``: key → tensor; streams and the pack are uint8. ``sites``: paths of the weights that have a tensor of their own;
    ``experts``: paths of parameters that have one for all their slices. ``pack``: the key of the pack, if there is one.
    """

    tensors: dict[str, Tensor]
    sites: list[str]
    experts: list[str]
    pack: str | None


def coded_state(model: nn.Module) -> CodedState:
    """What a checkpoint of a coded model holds; a tensor that several modules share is stored once.

    Raises ``CheckpointError`` if a weight is no longer what its codes say, because the model was trained after it was rounded.
    """
    coded, others = codes_of(model), other_codes_of(model)
    for path, record in coded.items():
        weight = weight_named(model, path)
        _check(path, record.weight().to(weight), weight)
    parameters = dict(model.named_parameters())
    for name, codes in others.items():
        _check(name, codes.weight().to(parameters[name]).view_as(parameters[name]), parameters[name])
    return state_of(model, coded, others)


def state_of(model: nn.Module, coded: Mapping[str, Coded], others: Mapping[str, Codes]) -> CodedState:
    """The same for codes that are not yet in the model: tensors without codes are those of ``model``."""
    base, prefix = base_of(model)
    inside = {name for name, _ in base.named_modules(remove_duplicate=False)}
    sites: dict[str, list[str]] = {}  # names of parameters, and the sites in them: one, or all experts of a layer
    experts: set[str] = set()
    for path in coded:
        is_expert = slice_at(model, path) is not None
        name = path.rpartition(".")[0] if is_expert else f"{path}.weight"
        key = f"{prefix if name.rpartition('.')[0] in inside else ''}{name}"
        sites.setdefault(key, []).append(path)
        experts |= {key} if is_expert else set()
    weights: dict[str, Codes | Product] = {}
    rest: dict[str, Codes] = {}
    plain: dict[str, Tensor] = {}
    large: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    tensors = model.state_dict(keep_vars=True)
    for key in sorted(tensors, key=lambda name: name not in sites and name not in others):  # coded names before their aliases
        tensor = tensors[key].detach()
        place = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() and place in seen:
            continue
        seen.add(place)
        if key in sites and not in_pack(tensor.numel() // len(sites[key])):
            streams = [coded[path].stream for path in sites[key]]
            large[key] = torch.frombuffer(bytearray(chained(streams) if key in experts else streams[0]), dtype=torch.uint8)
        elif key in experts:
            weights |= {f"{key}.{path.rpartition('.')[2]}": coded[path].codes() for path in sites[key]}
        elif key in sites:
            weights[key] = coded[sites[key][0]].codes()
        elif key in others:
            rest[key] = others[key]
        elif in_pack(tensor.numel()):
            plain[key] = stored(tensor)
        else:
            large[key] = stored(tensor).contiguous()
    together = {*weights, *rest, *plain}
    names = [key for key in tensors if key in together or (key in experts and key not in large)]
    alone = [path for key in large if key in sites and key not in experts for path in sites[key]]
    shelves = [sites[key][0].rpartition(".")[0] for key in large if key in experts]
    if not together:
        return CodedState(large, alone, shelves, None)
    first = next((key for key in names if key.startswith(prefix)), names[0])  # every class of this model has it
    packed = torch.frombuffer(bytearray(Pack(weights, rest, plain).to_bytes()), dtype=torch.uint8)
    packed = packed[None] if tensors[first].dim() == 1 else packed  # never of the tensor's own shape
    return CodedState(large | {first: packed}, alone, shelves, first)


def chained(streams: Sequence[bytes]) -> bytes:
    """Streams one after the other, behind their number and their lengths."""
    return struct.pack(f"<{1 + len(streams)}I", len(streams), *map(len, streams)) + b"".join(streams)


def unchained(chain: bytes) -> list[bytes]:
    """The streams that ``chained`` put together. Raises ``CheckpointError`` for bytes that are no such chain."""
    try:
        [count] = struct.unpack_from("<I", chain)
        lengths = struct.unpack_from(f"<{count}I", chain, 4)
    except struct.error as error:
        raise CheckpointError("the streams of experts are damaged: copy or download the checkpoint again") from error
    start = 4 + 4 * count
    if start + sum(lengths) != len(chain):
        raise CheckpointError(
            "the streams of experts are damaged (their lengths differ): copy or download the checkpoint again"
        )
    places = [start, *(start + end for end in itertools.accumulate(lengths))]
    return [chain[first:last] for first, last in itertools.pairwise(places)]


def _check(name: str, expected: Tensor, found: Tensor) -> None:
    if not torch.equal(expected, found):
        raise CheckpointError(
            f"{name} is not what it was rounded to: the model was changed after it was rounded; round it again"
        )
