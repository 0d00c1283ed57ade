"""A copy of a shared model in which every Linear is a plain one, for tools that know nothing of factors."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hpr.anatomy.wrappers import unwrapped
from hpr.nn.folded import FoldedLinear
from hpr.nn.linear import SharedLinear
from hpr.nn.site import SharedSite
from hpr.plans.terms import Term
from hpr.sharing.specification import note_specification
from hpr.sharing.unshare import stock, unshared


def fold(student: nn.Module) -> nn.Module:
    """A copy whose shared Linears are plain ``nn.Linear`` modules, for quantisers, LoRA and others; the student stays as it is.

    A Linear of low rank becomes two Linears with weights of their own, where that takes fewer numbers than a dense one. The
    second one has the name by which tools know the site: ``target_modules=["query"]`` of PEFT finds it, ``"inner"`` finds
    every first one. The product is balanced over the two, U·V = P S Qᵀ → P√S and √S Qᵀ, which makes both easier to quantise.
    Everything else becomes dense, as in ``unshare``: tables, experts, and sums of products over rows. Outputs equal the
    student's up to rounding. ``save_pretrained`` keeps the form, and ``from_pretrained`` restores it.

    Raises ``HprError`` as ``unshare``: where layers were dropped or reuse attention, or weights depend on the input.

    >>> plain = hpr.fold(student)
    >>> any(name.endswith("query.inner") for name, _ in plain.named_modules())
    True
    """
    student = unwrapped(student)
    tied = {module.path for module in student.modules() if isinstance(module, SharedSite) and type(module) is not SharedLinear}

    def made(site: SharedSite, weights: dict[str, nn.Parameter]) -> nn.Module:
        if type(site) is SharedLinear and site.path not in tied and _is_smaller(site):
            return _folded(site)
        return stock(site, weights)

    copied = unshared(student, made)
    note_specification(copied)
    return copied


def _is_smaller(site: SharedLinear) -> bool:
    """Whether two Linears hold all terms in fewer numbers than one. The ranks of terms add up."""
    if any(term.v is None or term.route is not None or _is_part(term, site) for term in site.terms):
        return False
    return _rank(site) * (site.out_features + site.in_features) < site.out_features * site.in_features


def _is_part(term: Term, site: SharedLinear) -> bool:
    return term.rows is not None and term.rows != (0, site.out_features)


def _rank(site: SharedLinear) -> int:
    return sum(term.rank or 0 for term in site.terms)


@torch.no_grad()
def _folded(site: SharedLinear) -> nn.Module:
    trained = bool(site.template.weight.requires_grad)
    inner, outer = balanced(*_product(site))
    dtype, device = site.weight.dtype, site.weight.device
    first = nn.Linear(site.in_features, _rank(site), bias=False, dtype=dtype, device="meta")
    second = nn.Linear(_rank(site), site.out_features, bias=site.bias is not None, dtype=dtype, device="meta")
    first.weight = nn.Parameter(inner.to(device, dtype), requires_grad=trained)
    second.weight = nn.Parameter(outer.to(device, dtype), requires_grad=trained)
    second.register_parameter("bias", site.bias)
    return FoldedLinear(first, second, site.path.rpartition(".")[2]).train(site.training)


def _product(site: SharedLinear) -> tuple[Tensor, Tensor]:
    """(V, U) of all terms of a site, their ranks one after the other, in float64: (rank, in) and (out, rank)."""
    lefts, rights = [], []
    for term in site.terms:
        u, v = site.bank[term.u].dense().double(), site.bank[str(term.v)].dense().double()
        lefts.append(u if term.row_scale is None else u * site.bank[term.row_scale].weight.double().T)
        rights.append(v if term.column_scale is None else v * site.bank[term.column_scale].weight.double())
    return torch.cat(rights), torch.cat(lefts, 1)


def balanced(inner: Float[Tensor, "rank in"], outer: Float[Tensor, "out rank"]) -> tuple[Tensor, Tensor]:
    """(√S Qᵀ, P√S) of the product P S Qᵀ = outer · inner, in the same shapes: both sides then have the same scales."""
    out, left = torch.linalg.qr(outer)
    into, right = torch.linalg.qr(inner.T)
    p, s, q = torch.linalg.svd(left @ right.T)
    return s.sqrt()[:, None] * (q @ into.T), (out @ p) * s.sqrt()
