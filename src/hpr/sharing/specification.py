"""Terms and shapes as ``config.json`` stores them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from torch import nn

from hpr.anatomy.lookup import base_of
from hpr.coding.stream import VERSION
from hpr.errors import HprError
from hpr.nn.bank import FORMAT, METHOD, bank_of, terms_in
from hpr.nn.coded import CodedState, coded_objective
from hpr.nn.site import SharedSite
from hpr.plans.terms import factors_of, terms_to_list


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
            sites[path] = terms_to_list(terms)
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
        **({"objective": bank.objective} if bank.objective else {}),
    }


def coded_specification(model: nn.Module, state: CodedState, hashes: Mapping[str, str]) -> dict[str, Any]:
    """The same for a model whose weights or factors are coded, saved as ``state``. ``hashes``: file → SHA-256."""
    objective = coded_objective(model)
    plain = {"quant_method": METHOD, "format": FORMAT, "hpr_version": version("hpr"), "sites": {}, "factors": {}}
    return {
        **(plain if bank_of(model) is None else specification(model)),
        "coded": {
            "format": VERSION,
            "hashes": dict(hashes),
            "sites": state.sites,
            "experts": state.experts,
            "pack": state.pack,
        },
        **({"objective": objective} if objective else {}),
    }


def is_specification(config: Any) -> bool:
    """Whether a model's ``quantization_config``, a dict or an object, is hpr's."""
    method = config.get("quant_method") if isinstance(config, Mapping) else getattr(config, "quant_method", None)
    return method == METHOD
