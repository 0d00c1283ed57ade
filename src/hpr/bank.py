"""Where factors live, and the Linear and Embedding that read them.

Each factor is one bias-free Linear in a ``FactorBank`` that hangs on the base model, so that a checkpoint's prefixes
resolve from ``AutoModel`` and from head classes alike. A site holds the bank *unregistered* (inside a tuple) and looks its
factors up by name at every call: references cached at build time go stale when parameters are replaced on load, by PEFT
or by FSDP. Parameters are shared, never modules.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpr.anatomy import base_of, weight_of
from hpr.errors import HprError
from hpr.planning.terms import Entry, FactorShape, Term, entry_to_dict, routers_of
from hpr.routing import Routing, fixed, weighed

BANK = "hpr_bank"
METHOD = "hpr"  # the name under which transformers finds hpr in a configuration
FORMAT = 1
MEND = "import hpr before loading this model"  # a buffer's name: loading without hpr lists it as an unexpected key


class Factor(nn.Linear):
    """One stored matrix F (rows, columns). With an identity block only the rest is stored, and the order of its side:

    ``identity="rows"``: F = [I; weight][order]; ``identity="columns"``: F = [I, weight][:, order].
    """

    order: Tensor

    def __init__(self, shape: FactorShape, dtype: torch.dtype | None = None):
        rows, columns = shape.stored
        super().__init__(columns, rows, bias=False, dtype=dtype)
        self.shape = shape
        if shape.identity:
            self.register_buffer("order", torch.arange(max(shape.rows, shape.columns), dtype=torch.int32))

    def reset_parameters(self) -> None:
        """Factors are always loaded, never drawn."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """F·x over the last dimension, plus a bias (rows,) in the same pass: (…, columns) → (…, rows).

        F is put together first: permuting a weight costs less than permuting the activations of many rows.
        """
        return F.linear(x, self.dense(), bias)

    def lookup(self, ids: Tensor) -> Tensor:
        """Rows of F by number: (…) → (…, columns)."""
        if self.shape.identity != "rows":
            return F.embedding(ids, self.dense())
        rank = self.shape.columns
        place = F.embedding(ids, self.order.unsqueeze(-1)).squeeze(-1).long()
        unit = F.one_hot(place.clamp(max=rank - 1), rank).to(self.weight.dtype)
        return torch.where((place < rank).unsqueeze(-1), unit, F.embedding((place - rank).clamp(min=0), self.weight))

    def dense(self) -> Tensor:
        """F itself, (rows, columns)."""
        if not self.shape.identity:
            return self.weight
        side = 0 if self.shape.identity == "rows" else 1
        identity = torch.eye(min(self.shape[:2]), dtype=self.weight.dtype, device=self.weight.device)
        return torch.cat([identity, self.weight], dim=side).index_select(side, self.order)


class FactorBank(nn.Module):
    """Factors by name, each stored once. Raises ``HprError`` where two names give one key, or a name cannot be a key.

    ``layers``: path of a block → its state, where it was dropped or reuses what one below computes (``planning.layers``).
    ``routing``: what routers see and give in the pass under way.
    """

    def __init__(self, shapes: Mapping[str, FactorShape], dtype: torch.dtype | None = None):
        super().__init__()
        self.factors = nn.ModuleDict()
        for name, shape in shapes.items():
            key = module_name(name)
            if hasattr(self.factors, key):
                raise HprError(f"factor {name!r} has the key {key!r}, which is taken: give it another name")
            self.factors[key] = Factor(shape, dtype)
        self.register_buffer(MEND, torch.zeros(1, dtype=dtype))
        self.layers: dict[str, str] = {}
        self.routing = Routing()

    @property
    def dtype(self) -> torch.dtype:
        return self.get_buffer(MEND).dtype

    def __getitem__(self, name: str) -> Factor:
        return self.factors[module_name(name)]  # type: ignore[return-value]

    @torch.no_grad()
    def load(self, values: Mapping[str, Tensor]) -> None:
        """Copy fitted values in: ``name`` → the stored matrix, ``name.order`` → the order where there is an identity block.

        Raises ``HprError`` where a value is missing, has another shape or is not finite.
        """
        fitted = {module_name(name): value for name, value in values.items()}
        for key, factor in self.factors.items():
            for part, target in factor.state_dict(keep_vars=True).items():
                value = fitted.get(key if part == "weight" else module_name(f"{key}.{part}"))
                if value is None or value.shape != target.shape or not torch.isfinite(value).all():
                    found = "missing" if value is None else f"of shape {tuple(value.shape)}, or not finite"
                    raise HprError(f"factor {key}.{part} is {found}; {tuple(target.shape)} is needed: fit the plan anew")
                target.copy_(value)


def module_name(factor: str) -> str:
    """A factor's key in the bank: module names cannot hold dots.

    In capitals, because transformers renames parts of keys (``v_proj`` to ``value``) on saving and loading, wherever they are.
    """
    return factor.replace(".", "-").upper()


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


def bank_of(model: nn.Module) -> FactorBank | None:
    """The bank of a shared model, None for any other."""
    bank = getattr(base_of(model)[0], BANK, None)
    return bank if isinstance(bank, FactorBank) else None


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


def terms_in(module: nn.Module) -> dict[str, tuple[Term, ...]]:
    """The sites that a module stands for, by path, with their terms: one, all its experts, or none for any other module."""
    found: dict[str, tuple[Term, ...]] = getattr(module, "terms_by_path", {})
    return found


def terms_of(model: nn.Module) -> dict[str, tuple[Term, ...]]:
    """Path of every shared site of a model → its terms, tied modules once."""
    return {path: terms for module in model.modules() for path, terms in terms_in(module).items()}


def factors_of(terms: Iterable[Term]) -> list[str]:
    """Names of all factors that some terms use, in order, each once; routers come last."""
    terms = list(terms)
    return list(dict.fromkeys([*(name for term in terms for name in term.factors), *routers_of(terms)]))


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
