"""What all modules that read the bank have in common."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hpr.anatomy.lookup import weight_of
from hpr.errors import HprError
from hpr.nn.bank import FactorBank
from hpr.plans.product import product
from hpr.plans.terms import Term, factors_of, routers_of


class BankReader(nn.Module):
    """A module that replaces one of the model and reads its weights from the bank.

    ``source`` is the module replaced. A template of it, without weights, is kept: ``unshare`` builds the stock module from it.
    Bank and template are held inside tuples, so that torch does not register them as submodules.
    """

    placeholders: tuple[str, ...] = ("weight",)  # buffers with the names of the parameters that the bank replaces

    def __init__(self, bank: FactorBank, source: nn.Module, path: str):
        nn.Module.__init__(self)  # not super(): with a subclass of nn.Embedding mixed in, nn.Embedding would come next
        self._bank = (bank,)
        self._template = (template_of(source),)
        self.path = path
        self.training = source.training

    @property
    def bank(self) -> FactorBank:
        return self._bank[0]

    @property
    def template(self) -> nn.Module:
        """The module that this one replaces, its parameters on the meta device."""
        return self._template[0]

    @property
    def qconfig(self) -> Any:
        """What torch.ao sets on every module of a model that it quantises. It would pass over this one without a word."""
        raise AttributeError("qconfig")

    @qconfig.setter
    def qconfig(self, value: Any) -> None:
        raise HprError(
            f"torch.ao quantises Linear modules, and {self.path} is a {type(self).__name__} that it would pass over: quantise "
            f"hpr.unshare(model), or let HPR round the factors (--bytes)"
        )

    @property
    @abstractmethod
    def terms_by_path(self) -> dict[str, tuple[Term, ...]]:
        """The paths of the sites that this module replaces, each with its terms."""


class SharedSite(BankReader):
    """What the modules that replace one site (a Linear, an embedding table) have in common: their terms.

    The one-element ``weight`` buffer makes loading without hpr fail on its shape instead of silently re-initialising, and
    serves models that read ``module.weight.dtype``. ``path`` is the site's path, also at its aliases.
    """

    weight: Tensor

    def __init__(self, bank: FactorBank, terms: Sequence[Term], source: nn.Module, path: str = ""):
        BankReader.__init__(self, bank, source, path)
        self.out_features, self.in_features = self.sizes(source)
        self.set_terms(terms)
        self.register_buffer("weight", torch.zeros(1, dtype=bank.dtype))

    @staticmethod
    def sizes(source: nn.Module) -> tuple[int, int]:
        """(out, in) of the weight replaced."""
        out_features, in_features = weight_of(source).shape
        return out_features, in_features

    def set_terms(self, terms: Sequence[Term]) -> None:
        """Read these terms from now on."""
        self.terms = tuple(terms)

    @property
    def terms_by_path(self) -> dict[str, tuple[Term, ...]]:
        """The path of its site, and its terms."""
        return {self.path: self.terms}

    def dense_weight(self) -> Float[Tensor, "out in"]:
        """The matrix that the terms add up to."""
        return dense(self.bank, self.terms, (self.out_features, self.in_features), self.weight)

    def extra_repr(self) -> str:
        ranks = ", ".join("full" if term.rank is None else str(term.rank) for term in self.terms)
        return f"out_features={self.out_features}, in_features={self.in_features}, ranks=[{ranks}]"

    def flops_per_row(self) -> int:
        """Multiply-adds × 2 for one input row; identity blocks are multiplied by like the rest."""
        names = [name for term in self.terms for name in (term.u, term.v) if name]
        names += routers_of(self.terms)
        return 2 * sum(shape.rows * shape.columns for shape in (self.bank[name].shape for name in names))


def dense(bank: FactorBank, terms: Sequence[Term], shape: Sequence[int], like: Tensor) -> Float[Tensor, "out in"]:
    """The matrix of this shape that terms add up to, with the dtype and device of ``like``."""
    values = {name: bank[name].dense() for name in factors_of(terms)}
    return product(terms, values, shape[0], shape[1]).to(like)


def template_of(source: nn.Module) -> nn.Module:
    """A shallow copy of a module whose parameters are on the meta device."""
    template = copy.copy(source)
    template._parameters = {
        name: None if parameter is None else nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        for name, parameter in source._parameters.items()
    }
    return template
