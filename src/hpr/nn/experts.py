"""Experts that read shared factors: the module that holds them, and back to the stock one.

A module's experts are slices of one parameter. If any of them is changed, all experts of that parameter are read from the
bank; kept ones become a private factor each, bit for bit, so that everything is stored once. Each call builds the dense
parameter and runs a stand-in of the original class with it, so that every implementation of experts works. That costs the
memory of one layer's dense experts and saves no computation.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from hpr.anatomy.fused_experts import Slice, sliced_parameters
from hpr.anatomy.model import Site
from hpr.errors import HprError
from hpr.nn.bank import FactorBank
from hpr.nn.site import BankReader, dense
from hpr.plans.terms import Term

Terms = dict[str, tuple[Term, ...]]


class SharedExperts(BankReader):
    """Replaces a module of experts. It keeps the module's other parameters, buffers, submodules and settings.

    ``slices``: parameter → the terms of each expert. ``path`` is the module's, below the base model. A placeholder of two
    numbers per expert has the name of each shared parameter: transformers can split and merge it when it saves and loads,
    and loading without hpr fails on its shape.
    """

    def __init__(self, bank: FactorBank, slices: Mapping[str, list[tuple[Term, ...]]], source: nn.Module, path: str):
        super().__init__(bank, source, path)
        self.slices = dict(slices)
        self.placeholders = tuple(self.slices)
        self._modules = source._modules
        self._buffers = dict(source._buffers)
        self._non_persistent_buffers_set = set(source._non_persistent_buffers_set)
        self._parameters = {name: value for name, value in source._parameters.items() if name not in self.slices}
        dtype = bank.dtype
        for name, experts in self.slices.items():
            zeros = torch.zeros(len(experts), 2, 1, dtype=dtype)
            # a Parameter, though in a buffer: transformers asks for its shape as for that of a weight
            self.register_buffer(name, nn.Parameter(zeros, requires_grad=False))
        for name, value in vars(source).items():  # its settings: the module around it may read them
            vars(self).setdefault(name, value)

    def train(self, mode: bool = True) -> SharedExperts:
        """Also tells the module that computes in its place."""
        self.template.training = mode
        return super().train(mode)

    @property
    def terms_by_path(self) -> Terms:
        """The path of each expert's site, and its terms."""
        return {
            f"{self.path}.{name}.{number}" if self.path else f"{name}.{number}": terms
            for name, experts in self.slices.items()
            for number, terms in enumerate(experts)
        }

    def dense_parameter(self, name: str) -> Float[Tensor, "experts out in"]:
        """The tensor that the terms of a parameter's experts add up to."""
        placeholder = self._buffers[name]
        shape = self.template._parameters[name].shape[1:]  # type: ignore[union-attr]
        assert placeholder is not None
        return torch.stack([dense(self.bank, terms, shape, placeholder) for terms in self.slices[name]])

    def forward(self, *positional: Any, **named: Any) -> Any:
        parameters = {name: self.dense_parameter(name) for name in self.slices}
        if torch.compiler.is_compiling():  # it cannot follow a copy, and traces in one thread
            return functional_call(self.template, {**self._parameters, **parameters}, positional, named)  # type: ignore[dict-item]
        return self._stand_in(parameters).forward(*positional, **named)

    def _stand_in(self, parameters: Mapping[str, Tensor]) -> nn.Module:
        """A module of the original's class with these parameters; a new one per call, so that threads do not share it."""
        module = copy.copy(self.template)
        module._parameters = {**self._parameters, **parameters}  # type: ignore[dict-item]
        module._modules = self._modules
        module._buffers = {name: buffer for name, buffer in self._buffers.items() if name not in self.slices}
        module.training = self.training
        return module

    def stock(self) -> nn.Module:
        """The dense module again, with parameters of its own."""
        parameters = {}
        for name in self.slices:
            wanted = bool(self.template._parameters[name].requires_grad)  # type: ignore[union-attr]
            parameters[name] = nn.Parameter(self.dense_parameter(name).detach(), requires_grad=wanted)
        order = list(self.template._parameters)
        module = self._stand_in(parameters)
        module._parameters = {name: module._parameters[name] for name in order}
        return module

    def extra_repr(self) -> str:
        return ", ".join(f"{name}: {len(experts)} experts" for name, experts in self.slices.items())


def shared_experts(
    bank: FactorBank, experts: Mapping[str, Slice], terms: Mapping[str, Iterable[Term]]
) -> dict[nn.Module, SharedExperts]:
    """Module → what takes its place. Raises ``HprError`` if only some experts of a parameter have terms."""
    found: dict[nn.Module, dict[str, dict[int, tuple[Term, ...]]]] = {}
    paths: dict[nn.Module, str] = {}
    for path, one in experts.items():
        found.setdefault(one.module, {}).setdefault(one.parameter, {})[one.number] = tuple(terms[path])
        paths[one.module] = path.rpartition(".")[0].rpartition(".")[0]
    swaps = {}
    for module, parameters in found.items():
        slices = {}
        for name, parameter in sliced_parameters(module):
            if name in parameters:
                if missing := sorted(set(range(len(parameter))) - set(parameters[name])):
                    raise HprError(
                        f"{paths[module]}.{name}: expert {missing[0]} of {len(parameter)} has no terms; give all or none of "
                        f"a parameter's experts"
                    )
                slices[name] = [parameters[name][number] for number in range(len(parameter))]
        swaps[module] = SharedExperts(bank, slices, module, paths[module])
    return swaps


def site_of(path: str, expert: Slice) -> Site:
    """An expert's site by its path alone, as the terms need it."""
    out_features, in_features = expert.weight.shape
    return Site(path, "linear", out_features, in_features, has_bias=False, expert=expert.number)
