"""A copy of a shared model for inference: nothing is put together when it is called."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hpr.anatomy.wrappers import unwrapped
from hpr.errors import HprError
from hpr.nn.bank import Factor, FactorBank, bank_of, module_name, terms_of
from hpr.nn.coded import attach_codes
from hpr.nn.experts import SharedExperts
from hpr.nn.linear import SharedLinear
from hpr.nn.site import BankReader, SharedSite
from hpr.plans.terms import FactorShape, factors_of
from hpr.sharing.specification import note_specification
from hpr.sharing.unshare import stock, unshare

POSITIONS = 128
_RUNS = 7  # timed runs of each way to compute a product, of which the fastest counts


def materialise(student: nn.Module, positions: int = POSITIONS) -> nn.Module:
    """A copy of a shared model that is faster and takes more memory; the student itself does not change.

    A student stores each identity block of a factor as an order, and builds the factor at every call. The copy holds it built.
    Where one dense product of a Linear takes less time on this machine than the products of its factors, for an input of
    ``positions`` vectors, the copy has a plain Linear with the dense weight; a head that is tied to a table keeps its factors.
    Fused experts become plain ones, too. Outputs equal the student's up to rounding, or bit for bit if nothing became dense.

    A model without shared factors is copied. Raises ``HprError`` for ``positions`` below 1 and for a model that cannot be
    copied (see ``hpr.share``).

    >>> fast = hpr.materialise(student)
    >>> hpr.describe(fast).total_parameters > 0
    True
    """
    if type(positions) is not int or positions < 1:
        raise HprError(f"positions is {positions!r}: give a whole number from 1 up, such as the tokens of a typical call")
    return built(student, lambda site: dense_is_faster(site, positions))


def built(student: nn.Module, becomes_dense: Callable[[SharedLinear], bool]) -> nn.Module:
    """A copy that stores every factor whole, with plain Linears for the sites that ``becomes_dense`` chooses by their shape."""
    copied = copy.deepcopy(unwrapped(student))
    bank = bank_of(copied)
    if bank is None:
        return copied
    attach_codes(copied, {}, bank.objective)  # whole factors have no codes
    _build(copied, bank)
    _make_dense(copied, becomes_dense)
    if not bank.layers and not any(isinstance(module, BankReader) for module in copied.modules()):
        return unshare(copied)  # everything became dense
    _forget_unused(copied, bank)
    note_specification(copied)
    return copied


def _build(model: nn.Module, bank: FactorBank) -> None:
    """Store every factor whole, and let the terms say so."""
    for key, factor in list(bank.factors.items()):
        assert isinstance(factor, Factor)
        if factor.shape.identity:
            whole = Factor(FactorShape(factor.shape.rows, factor.shape.columns), factor.weight.dtype)
            whole.weight = nn.Parameter(factor.dense().detach(), requires_grad=factor.weight.requires_grad)
            bank.factors[key] = whole.train(factor.training)
    for module in model.modules():
        if isinstance(module, SharedSite):
            module.set_terms([replace(term, identity="") for term in module.terms])


def _make_dense(model: nn.Module, becomes_dense: Callable[[SharedLinear], bool]) -> None:
    """Replace the chosen modules by dense ones; none with routers, and no head that reads a table's factors."""
    tables = {module.path for module in model.modules() if isinstance(module, SharedSite) and type(module) is not SharedLinear}
    weights: dict[str, nn.Parameter] = {}
    chosen: dict[nn.Module, nn.Module] = {}
    chosen_shapes: dict[Any, bool] = {}
    decided: dict[str, bool] = {}  # by site: all who read one weight read it in one way
    with torch.no_grad():
        for parent in list(model.modules()):
            for name, child in list(parent._modules.items()):
                if isinstance(child, SharedExperts) and child not in chosen:
                    chosen[child] = child.stock()
                elif type(child) is SharedLinear and child.path not in tables and child not in chosen:
                    shape = _shape(child)
                    if shape not in chosen_shapes:
                        chosen_shapes[shape] = becomes_dense(child)
                    if decided.setdefault(child.path, chosen_shapes[shape]):
                        chosen[child] = stock(child, weights)
                if child in chosen:
                    setattr(parent, name, chosen[child])


def _shape(site: SharedLinear) -> Any:
    """What the time of a site depends on."""
    terms = [(term.rank, term.v is None, term.rows, term.row_scale is None, term.column_scale is None) for term in site.terms]
    return site.out_features, site.in_features, site.bias is None, tuple(terms)


def multiplies_less(site: SharedLinear) -> bool:
    """Whether one dense product multiplies no more than those of a site's factors."""
    return site.flops_per_row() >= 2 * site.out_features * site.in_features


def dense_is_faster(site: SharedLinear, positions: int) -> bool:
    """Whether one dense product takes less time than those of a site's factors. It is timed if it multiplies more."""
    if multiplies_less(site):
        return True
    weight = site.dense_weight()
    x = torch.randn(positions, site.in_features, dtype=torch.float32).to(weight)
    thin, dense = _fastest(lambda: site(x), lambda: F.linear(x, weight, site.bias))
    return dense < thin


def _fastest(*calls: Callable[[], Tensor]) -> list[float]:
    """The least seconds of each call. The calls take turns, so that a busy machine slows all of them."""
    seconds = [float("inf")] * len(calls)
    for run in range(_RUNS + 1):
        for number, call in enumerate(calls):
            start = time.perf_counter()
            result = call()
            if result.is_cuda:
                torch.cuda.synchronize(result.device)
            if run:  # the first one warms up
                seconds[number] = min(seconds[number], time.perf_counter() - start)
    return seconds


def _forget_unused(model: nn.Module, bank: FactorBank) -> None:
    """Take factors out of the bank that no site reads any more."""
    used = {module_name(name) for terms in terms_of(model).values() for name in factors_of(terms)}
    for key in [key for key in bank.factors if key not in used]:
        del bank.factors[key]
