"""Terms and shapes as ``config.json`` stores them."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hpr.anatomy.lookup import base_of
from hpr.coding.stream import VERSION
from hpr.errors import HprError
from hpr.nn.bank import FORMAT, METHOD, bank_of, terms_in
from hpr.nn.coded import CodedState, coded_objective
from hpr.nn.folded import folded_in
from hpr.nn.site import SharedSite
from hpr.plans.terms import factors_of, terms_to_list

# Before transformers reads weights, it looks up the fusions that a configuration names, and its error ends with a name that it
# does not know. With hpr it knows this one, which is switched off.
NEEDS_HPR = "this model needs the package hpr (Hierarchical Parameter Reuse): pip install hpr, and import hpr before loading"


def note_specification(model: nn.Module) -> None:
    """Write what a shared or folded model of transformers is into its configuration, in place. Other modules have none."""
    if isinstance(model, PreTrainedModel) and (bank_of(model) is not None or folded_in(model)):
        model.config.quantization_config = specification(model)
        model.config.fusion_config = with_mend(getattr(model.config, "fusion_config", None))


def forget_specification(model: nn.Module) -> None:
    """Undo ``note_specification``; what others wrote into the configuration stays."""
    if not isinstance(model, PreTrainedModel):
        return
    if is_specification(getattr(model.config, "quantization_config", None)):
        del model.config.quantization_config
    if NEEDS_HPR in (fusions := getattr(model.config, "fusion_config", None) or {}):
        others = {name: value for name, value in fusions.items() if name != NEEDS_HPR}
        if others:
            model.config.fusion_config = others
        else:
            del model.config.fusion_config


def with_mend(fusions: Mapping[str, Any] | None) -> dict[str, Any]:
    """The ``fusion_config`` of a checkpoint, so that loading without hpr stops and says what to install."""
    return {**(fusions or {}), NEEDS_HPR: False}


def specification(model: nn.Module) -> dict[str, Any]:
    """All that loading needs, as JSON values; it goes into ``config.json``. Paths are relative to the base model.

    Raises ``HprError`` for a model without a bank.
    """
    bank = bank_of(model)
    if bank is None and (folded := folded_in(model)):
        return {**_nothing_shared(), "folded": {path: module.rank for path, module in folded.items()}}
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
                factors[factor] = [part for part in bank.stored(factor).shape if part != ""]
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
    return {
        **(_nothing_shared() if bank_of(model) is None else specification(model)),
        "coded": {
            "format": VERSION,
            "hashes": dict(hashes),
            "sites": state.sites,
            "experts": state.experts,
            "pack": state.pack,
        },
        **({"objective": objective} if objective else {}),
    }


def _nothing_shared() -> dict[str, Any]:
    return {"quant_method": METHOD, "format": FORMAT, "hpr_version": version("hpr"), "sites": {}, "factors": {}}


def is_specification(config: Any) -> bool:
    """Whether a model's ``quantization_config``, a dict or an object, is hpr's."""
    method = config.get("quant_method") if isinstance(config, Mapping) else getattr(config, "quant_method", None)
    return method == METHOD
