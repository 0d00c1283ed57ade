"""The bank, which holds all factors of a model.

Each factor is one bias-free Linear in a ``FactorBank``. The bank is an attribute of the base model, so that a checkpoint's
prefixes resolve from ``AutoModel`` and from head classes. A site holds the bank *unregistered* (inside a tuple) and looks
its factors up by name at every call, because references from build time go stale when loading, PEFT or FSDP replace
parameters. Parameters are shared, never modules.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from hpr.anatomy.lookup import base_of
from hpr.errors import HprError
from hpr.nn.coded import coded_objective
from hpr.nn.router import Routing
from hpr.plans.terms import FactorShape, Term

BANK = "hpr_bank"
METHOD = "hpr"  # the name under which transformers finds hpr in a configuration
FORMAT = 1
MEND = "import hpr before loading this model"  # a buffer's name: loading without hpr lists it as an unexpected key


class Factor(nn.Linear):
    """One stored matrix F (rows, columns). With an identity block only the rest is stored, and the order of its side:

    ``identity="rows"``: F = [I; weight][order]; ``identity="columns"``: F = [I, weight][:, order].
    """

    order: Tensor
    is_site = True  # its numbers are a matrix to round, although an identity block makes it more than a product

    def __init__(self, shape: FactorShape, dtype: torch.dtype | None = None):
        rows, columns = shape.stored
        super().__init__(columns, rows, bias=False, dtype=dtype)
        self.shape = shape
        if shape.identity:
            self.register_buffer("order", torch.arange(max(shape.rows, shape.columns), dtype=torch.int32))

    def reset_parameters(self) -> None:
        """Factors are always loaded, never drawn."""

    def forward(
        self, x: Float[Tensor, "*batch columns"], bias: Float[Tensor, " rows"] | None = None
    ) -> Float[Tensor, "*batch rows"]:
        """F·x over the last dimension, plus a bias in the same pass.

        F is built first: permuting a weight costs less than permuting the activations of many rows.
        """
        return F.linear(x, self.dense(), bias)

    def lookup(self, ids: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch columns"]:
        """Rows of F by number."""
        if self.shape.identity != "rows":
            return F.embedding(ids, self.dense())
        rank = self.shape.columns
        row = F.embedding(ids, self.order.unsqueeze(-1)).squeeze(-1).long()  # below the rank: a row of the identity block
        unit = F.one_hot(row.clamp(max=rank - 1), rank).to(self.weight.dtype)
        return torch.where((row < rank).unsqueeze(-1), unit, F.embedding((row - rank).clamp(min=0), self.weight))

    def dense(self, stored: Tensor | None = None) -> Float[Tensor, "rows columns"]:
        """F itself, with its identity block. ``stored``: numbers in place of those that it stores."""
        weight = self.weight if stored is None else stored
        if not self.shape.identity:
            return weight
        side = 0 if self.shape.identity == "rows" else 1
        identity = torch.eye(min(self.shape[:2]), dtype=weight.dtype, device=weight.device)
        return torch.cat([identity, weight], dim=side).index_select(side, self.order)


class FactorBank(nn.Module):
    """Factors by name, each stored once. Raises ``HprError`` if two names give one key, or a name cannot be a key.

    ``layers``: path of a block → its state, if it was dropped or reuses attention (``plans.layer_states``). ``objective``: the
    name of the objective that the profile measured, None if the factors were fitted without a profile. ``routing``: what
    routers see and return in the current pass.

    >>> bank = FactorBank({"basis": FactorShape(8, 2)})
    >>> bank.load({"basis": torch.ones(8, 2)})
    >>> bank["basis"](torch.ones(3, 2)).shape
    torch.Size([3, 8])
    """

    def __init__(self, shapes: Mapping[str, FactorShape], dtype: torch.dtype | None = None):
        super().__init__()
        self.factors = nn.ModuleDict()
        self._keys = {name: module_name(name) for name in shapes}
        for name, shape in shapes.items():
            key = self._keys[name]
            if hasattr(self.factors, key):
                raise HprError(f"factor {name!r} has the key {key!r}, which is taken: give it another name")
            self.factors[key] = Factor(shape, dtype)
        self.register_buffer(MEND, torch.zeros(1, dtype=dtype))
        self.layers: dict[str, str] = {}
        self.objective: str | None = None
        self.routing = Routing()

    @property
    def dtype(self) -> torch.dtype:
        return self.get_buffer(MEND).dtype

    def __getitem__(self, name: str) -> Factor:
        factor = self.stored(name)
        return in_memory(factor) if factor.weight.is_meta and hasattr(factor, "_hf_hook") else factor

    def stored(self, name: str) -> Factor:
        """A factor as the bank holds it: without numbers while accelerate keeps them elsewhere."""
        return self.factors[self._keys.get(name) or module_name(name)]  # type: ignore[return-value]

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Copy fitted values in: ``name`` → the stored matrix, ``name.order`` → the order if there is an identity block.

        Raises ``HprError`` if a value is missing, has another shape or is not finite.
        """
        fitted = {module_name(name): value for name, value in values.items()}
        for key, factor in self.factors.items():
            for part, target in factor.state_dict(keep_vars=True).items():
                value = fitted.get(key if part == "weight" else module_name(f"{key}.{part}"))
                if value is None or value.shape != target.shape or not torch.isfinite(value).all():
                    problem = "missing" if value is None else f"of shape {tuple(value.shape)}, or not finite"
                    raise HprError(f"factor {key}.{part} is {problem}; {tuple(target.shape)} is needed: fit the plan anew")
                target.copy_(value)


def in_memory(factor: Factor) -> Factor:
    """A stand-in with the numbers of an offloaded factor.

    Hooks of accelerate bring them back while a module is called, but sites also read factors without a call.
    """
    hook: Any = factor._hf_hook
    hook.pre_forward(factor)
    found = copy.copy(factor)
    found._parameters, found._buffers = dict(factor._parameters), dict(factor._buffers)
    hook.post_forward(factor, None)
    for name in ("forward", "_old_forward", "_hf_hook"):  # what accelerate set on the factor
        vars(found).pop(name, None)
    return found


def module_name(factor: str) -> str:
    """A factor's key in the bank: module names cannot hold dots.

    In capitals, because transformers renames parts of keys (``v_proj`` to ``value``) when it saves and loads.
    """
    return factor.replace(".", "-").upper()


def bank_of(model: nn.Module) -> FactorBank | None:
    """The bank of a shared model, None for any other."""
    bank = getattr(base_of(model)[0], BANK, None)
    return bank if isinstance(bank, FactorBank) else None


def recorded_objective(model: nn.Module) -> str | None:
    """The name of the objective that a shared or coded model was fitted for, None if the model records none."""
    bank = bank_of(model)
    return coded_objective(model) if bank is None else bank.objective


def terms_in(module: nn.Module) -> dict[str, tuple[Term, ...]]:
    """Path → terms of the sites that a module replaces: one site, all its experts, or none for a module of the original."""
    terms: dict[str, tuple[Term, ...]] = getattr(module, "terms_by_path", {})
    return terms


def terms_of(model: nn.Module) -> dict[str, tuple[Term, ...]]:
    """Path of every shared site of a model → its terms, tied modules once."""
    return {path: terms for module in model.modules() for path, terms in terms_in(module).items()}


def parameters(model: nn.Module) -> int:
    """Unique parameters, tied ones and shared factors once.

    The order of a factor's identity block counts as one parameter per row, so that the count equals the plan's. Weights that
    are kept as integers count like others.
    """
    bank = bank_of(model)
    orders = [] if bank is None else [buffer.numel() for name, buffer in bank.named_buffers() if name.endswith(".order")]
    buffers = dict(model.named_buffers())
    kept = [name.removesuffix("rows") for name in buffers if name.endswith(".integers.rows")]
    integers = [buffers[f"{name}rows"].numel() * buffers[f"{name}columns"].numel() for name in kept]
    return sum(parameter.numel() for parameter in model.parameters()) + sum(orders) + sum(integers)
