"""What every module that stands at a site has in common."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hpr.anatomy.lookup import weight_of
from hpr.nn.bank import FactorBank
from hpr.plans.product import product
from hpr.plans.terms import Term, factors_of, routers_of


class SharedSite(nn.Module):
    """What a shared Linear and a shared Embedding have in common: their terms and the bank.

    The one-element ``weight`` buffer makes loading without hpr fail on its shape instead of silently re-initialising, and
    serves models that read ``module.weight.dtype``. ``source`` is the module replaced; of it a shell without weights is
    kept, from which ``unshare`` builds the stock module again. ``path`` is the site's path, also at its aliases.
    """

    placeholders = ("weight",)
    weight: Tensor

    def __init__(self, bank: FactorBank, terms: Sequence[Term], source: nn.Module, path: str = ""):
        nn.Module.__init__(self)  # not super(): with a subclass of nn.Embedding mixed in, that one would come next
        self._bank = (bank,)
        self._shell = (shell_of(source),)
        self.path = path
        self.out_features, self.in_features = weight_of(source).shape
        self.set_terms(terms)
        self.register_buffer("weight", torch.zeros(1, dtype=bank.dtype))
        self.train(source.training)

    def set_terms(self, terms: Sequence[Term]) -> None:
        """Read these terms from now on."""
        self.terms = tuple(terms)

    @property
    def bank(self) -> FactorBank:
        return self._bank[0]

    @property
    def shell(self) -> nn.Module:
        """The module that this one replaces, its parameters on the meta device."""
        return self._shell[0]

    @property
    def terms_by_path(self) -> dict[str, tuple[Term, ...]]:
        """Its own path and terms."""
        return {self.path: self.terms}

    def dense_weight(self) -> Tensor:
        """The (out, in) matrix that the terms add up to."""
        return dense(self.bank, self.terms, (self.out_features, self.in_features), self.weight)

    def extra_repr(self) -> str:
        ranks = ", ".join("full" if term.rank is None else str(term.rank) for term in self.terms)
        return f"out_features={self.out_features}, in_features={self.in_features}, ranks=[{ranks}]"

    def flops_per_row(self) -> int:
        """Multiply-adds × 2 for one input row; identity blocks are multiplied by like the rest."""
        names = [name for term in self.terms for name in (term.u, term.v) if name]
        names += routers_of(self.terms)
        return 2 * sum(shape.rows * shape.columns for shape in (self.bank[name].shape for name in names))


def dense(bank: FactorBank, terms: Sequence[Term], shape: Sequence[int], like: Tensor) -> Tensor:
    """The (out, in) matrix that terms add up to, with dtype and device of another tensor."""
    values = {name: bank[name].dense() for name in factors_of(terms)}
    return product(terms, values, shape[0], shape[1]).to(like)


def shell_of(source: nn.Module) -> nn.Module:
    """A shallow copy of a module whose parameters are on the meta device."""
    shell = copy.copy(source)
    shell._parameters = {
        name: None if parameter is None else nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        for name, parameter in source._parameters.items()
    }
    return shell
