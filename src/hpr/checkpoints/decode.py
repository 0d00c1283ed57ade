"""Decodes the streams of a checkpoint while transformers loads it: as conversions of tensors, one for each kind of stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.pytorch_utils import Conv1D

from hpr.anatomy.lookup import base_of
from hpr.coding.codes import Codes
from hpr.coding.pack import Pack
from hpr.coding.record import Coded
from hpr.nn.coded import unchained


@dataclass
class Decoded:
    """What is decoded while a model is loaded: streams by site, and the codes of other parameters by name."""

    coded: dict[str, Coded] = field(default_factory=dict)
    others: dict[str, Codes] = field(default_factory=dict)
    unpacked: bool = False


class Decode(ConversionOps):
    """Decodes a tensor, and notes its codes, so that the model can be saved as it was loaded."""

    def __init__(self, decoded: Decoded):
        self.decoded = decoded

    def __deepcopy__(self, memo: Any) -> Decode:
        return self  # transformers copies the converter for each weight; all of them note in one place

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("hpr.save writes coded weights")


class DecodeWeight(Decode):
    """Decodes the stream of one weight."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **given: Any
    ) -> dict[str, Any]:
        model, key = given["model"], given["full_layer_name"]
        coded = Coded(_bytes(input_dict))
        return {key: _placed(model, key, coded.weight(), self.decoded.coded, coded)}


class DecodeExperts(Decode):
    """Decodes the streams of one parameter whose slices are experts."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **given: Any
    ) -> dict[str, Any]:
        model, key = given["model"], given["full_layer_name"]
        experts = [Coded(stream) for stream in unchained(_bytes(input_dict))]
        return {key: _stacked(model, key, dict(enumerate(experts)), self.decoded.coded)}


class DecodePack(Decode):
    """Decodes all the tensors that lie in one pack, as far as the class has them."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **given: Any
    ) -> dict[str, Any]:
        model, own = given["model"], given["full_layer_name"]
        pack, decoded = Pack.from_bytes(_bytes(input_dict)), self.decoded
        tensors = model.state_dict()
        found: dict[str, Any] = {own: None}  # first, since transformers looks for the first name that is part of its own
        experts: dict[str, dict[int, Coded]] = {}
        for name, codes in pack.weights.items():
            parameter, _, number = name.rpartition(".")
            if key := _key(model, tensors, name):
                found[key] = _placed(model, key, codes.weight(), decoded.coded, Coded.of(codes))
            elif number.isdigit() and (key := _key(model, tensors, parameter)):
                experts.setdefault(key, {})[int(number)] = Coded.of(codes)
        found |= {key: _stacked(model, key, several, decoded.coded) for key, several in experts.items()}
        for name, codes in pack.others.items():
            if key := _key(model, tensors, name):
                found[key] = codes.weight().view(tensors[key].shape).to(tensors[key].dtype)
                decoded.others[key] = codes
        for name, tensor in pack.plain.items():
            if key := _key(model, tensors, name):
                found[key] = tensor.to(tensors[key].dtype)
        decoded.unpacked = True
        return found


def _bytes(input_dict: Mapping[str, Any]) -> bytes:
    [stream] = input_dict.values()
    tensor: Tensor = stream[0] if isinstance(stream, list) else stream
    return tensor.cpu().numpy().tobytes()


def _key(model: nn.Module, tensors: Mapping[str, Tensor], name: str) -> str | None:
    """The key of a saved tensor in this class, which may have a head more or less than the class that was saved."""
    prefix = base_of(model)[1] or f"{getattr(model, 'base_model_prefix', '')}."
    return next((key for key in (name, name.removeprefix(prefix), prefix + name) if key in tensors), None)


def _placed(model: nn.Module, key: str, weight: Tensor, noted: dict[str, Coded], coded: Coded) -> Tensor:
    """A site's weight as its parameter has it; its stream is noted."""
    name = key.removesuffix(".weight")
    module = model.get_submodule(name)
    noted[name.removeprefix(base_of(model)[1])] = coded
    parameter: Tensor = module.weight  # type: ignore[assignment]
    return (weight.T.contiguous() if isinstance(module, Conv1D) else weight).to(parameter.dtype)


def _stacked(model: nn.Module, key: str, experts: Mapping[int, Coded], noted: dict[str, Coded]) -> Tensor:
    """All the experts of a parameter; their streams are noted."""
    name = key.removeprefix(base_of(model)[1])
    noted |= {f"{name}.{number}": coded for number, coded in experts.items()}
    dtype = model.get_parameter(key).dtype
    return torch.stack([experts[number].weight().to(dtype) for number in range(len(experts))])


def decodes(conversion: Any) -> bool:
    """Whether a conversion of transformers decodes streams."""
    return any(isinstance(operation, Decode) for operation in getattr(conversion, "operations", ()))
