"""The modules that read factors: a Linear and an Embedding, and what is written down of them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpr.anatomy import base_of, weight_of
from hpr.bank import FORMAT, METHOD, FactorBank, bank_of, factors_of, terms_in
from hpr.errors import HprError
from hpr.planning.terms import Entry, Term, entry_to_dict, routers_of
from hpr.routing import fixed, weighed


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
        self.terms = tuple(terms)
        self.path = path
        self.out_features, self.in_features = weight_of(source).shape
        self.register_buffer("weight", torch.zeros(1, dtype=bank.dtype))
        self.train(source.training)

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


class SharedLinear(SharedSite):
    """y = Σ_j α_j(x) diag(r) U V diag(c) x + bias; the bias is private. x (…, in) → y (…, out)."""

    bias: nn.Parameter | None

    def __init__(self, bank: FactorBank, terms: Sequence[Term], source: nn.Module, path: str = ""):
        super().__init__(bank, terms, source, path)
        self.register_parameter("bias", getattr(source, "bias", None))  # the same one: it may be tied (BERT's decoder)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor | None = None
        bias, weights = self.bias, self.weights(x)
        if x.dim() == 3 and self.merges(x.shape[1]):
            experts = [term.route.expert for term in self.terms if term.route is not None]
            alpha = weights[routers_of(self.terms)[0]][:, 0, experts]
            merged = torch.einsum("bk,koi->bio", alpha, torch.stack([self.bank[term.u].dense() for term in self.terms]))
            return x @ merged if bias is None else torch.baddbmm(bias, x, merged)
        for term in self.terms:
            y = x if term.column_scale is None else x * self.bank[term.column_scale].weight[0]
            if term.v is not None:
                y = self.bank[term.v](y)
            if term.route is not None:
                y = y * weighed(weights[term.route.router], term.route, term.rank)
            whole = term.rows is None or term.rows == (0, self.out_features)
            if whole and term.row_scale is None and bias is not None:
                y, bias = self.bank[term.u](y, bias), None  # a pass of its own would cost as much as a small product
            else:
                y = self.bank[term.u](y)
            if term.row_scale is not None:
                y = y * self.bank[term.row_scale].weight[0]
            if not whole and term.rows is not None:
                y = F.pad(y, (term.rows[0], self.out_features - term.rows[1]))
            total = y if total is None else total + y
        assert total is not None
        return total if bias is None else total + bias

    def merges(self, positions: int) -> bool:
        """Whether whole matrices weighed for each sequence are put together first: cheaper than a product with each of them."""
        routes = [term.route for term in self.terms if term.route is not None and term.route.expert is not None]
        whole = all(term == Term(term.u, route=term.route) for term in self.terms)
        same = len({(route.router, route.per) for route in routes}) == 1 and len(routes) == len(self.terms)
        return whole and same and routes[0].per == "sequence" and positions * len(routes) > positions + len(routes)

    def weights(self, x: Tensor) -> dict[str, Tensor]:
        """Router → α (…, experts) for an input x (…, in)."""
        found: dict[str, Tensor] = {}
        for route in (term.route for term in self.terms if term.route is not None):
            if route.router not in found:
                found[route.router] = self.bank.routing(route, self.bank[route.router].weight, x, self.path)
        return found


class SharedEmbedding(SharedSite):
    """Rows of Σ_j U V looked up by id, without ever building the table. ids (…) → (…, d)."""

    def __init__(self, bank: FactorBank, terms: Sequence[Term], source: nn.Embedding, path: str = ""):
        SharedSite.__init__(self, bank, terms, source, path)
        self.num_embeddings = source.num_embeddings
        self.embedding_dim = source.embedding_dim
        self.padding_idx = source.padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        total: Tensor | None = None
        for term in self.terms:
            start, stop = term.rows or (0, self.out_features)
            local = ids - start
            if (start, stop) != (0, self.out_features):  # the ends stay open, so that an id beyond the table still raises
                last = None if stop == self.out_features else stop - start - 1
                local = local.clamp(min=0 if start else None, max=last)
            y = self.bank[term.u].lookup(local)
            if term.row_scale is not None:
                y = y * F.embedding(local, self.bank[term.row_scale].weight.T)
            if (start, stop) != (0, self.out_features):
                y = y * ((ids >= start) & (ids < stop)).unsqueeze(-1)
            if term.v is not None:
                y = F.linear(y, self.bank[term.v].dense().T)
            if term.column_scale is not None:
                y = y * self.bank[term.column_scale].weight[0]
            total = y if total is None else total + y
        assert total is not None
        return total


def dense(bank: FactorBank, terms: Sequence[Term], shape: Sequence[int], like: Tensor) -> Tensor:
    """The (out, in) matrix that terms add up to, with dtype and device of another tensor."""
    total = torch.zeros(*shape, dtype=like.dtype, device=like.device)
    for term in terms:
        product = bank[term.u].dense()
        if term.route is not None:
            product = product * weighed(fixed(term.route, bank[term.route.router].weight), term.route, term.rank)
        if term.v is not None:
            product = product @ bank[term.v].dense()
        if term.row_scale is not None:
            product = product * bank[term.row_scale].weight.T
        if term.column_scale is not None:
            product = product * bank[term.column_scale].weight
        start, stop = term.rows or (0, shape[0])
        total[start:stop] = total[start:stop] + product
    return total


def specification(model: nn.Module) -> dict[str, Any]:
    """All that loading needs, as JSON values; it goes into ``config.json``. Paths are relative to the base model.

    Raises ``HprError`` for a model without a bank.
    """
    bank = bank_of(model)
    if bank is None:
        raise HprError(f"this {type(model).__name__} shares nothing, so there is nothing to write down: share it first")
    _, prefix = base_of(model)
    sites: dict[str, list[dict[str, Any]]] = {}
    aliases: dict[str, list[str]] = {}
    factors: dict[str, list[Any]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SharedSite) and module.path != (path := name.removeprefix(prefix)):
            aliases.setdefault(module.path, []).append(path)
        for path, terms in terms_in(module).items():
            sites[path] = entry_to_dict(Entry("", terms))["terms"]
            for factor in factors_of(terms):
                factors[factor] = [part for part in bank[factor].shape if part != ""]
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "hpr_version": version("hpr"),
        "sites": sites,
        "factors": factors,
        "aliases": aliases,
        **({"layers": dict(bank.layers)} if bank.layers else {}),
    }


def is_specification(config: Any) -> bool:
    """Whether a model's ``quantization_config``, a dict or an object, is hpr's."""
    method = config.get("quant_method") if isinstance(config, Mapping) else getattr(config, "quant_method", None)
    return method == METHOD


def shell_of(source: nn.Module) -> nn.Module:
    """A shallow copy of a module whose parameters are on the meta device."""
    shell = copy.copy(source)
    shell._parameters = {
        name: None if parameter is None else nn.Parameter(parameter.detach().to("meta"), parameter.requires_grad)
        for name, parameter in source._parameters.items()
    }
    return shell
