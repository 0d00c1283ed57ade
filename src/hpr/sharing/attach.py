"""Attach a bank to a model, and swap the module of each site for one that reads its factors from the bank.

``share`` does that to a copy of a model and loads the fitted factors; loading a checkpoint does it before weights are read.
A module that holds the same parameter as a site (a head tied to the embedding) reads the same factors; see ``sharing.ties``.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hpr.anatomy.fused_experts import Slice
from hpr.anatomy.lookup import base_of, module_at, slice_at, weight_of
from hpr.anatomy.model import Site
from hpr.anatomy.swappable import check_replaceable, check_site
from hpr.errors import HprError
from hpr.nn.bank import BANK, FactorBank, bank_of
from hpr.nn.embedding import SharedEmbedding
from hpr.nn.experts import shared_experts, site_of
from hpr.nn.linear import SharedLinear
from hpr.nn.removed import ZeroOutput
from hpr.nn.routed import RoutedLinear
from hpr.nn.router import note_masks
from hpr.nn.site import SharedSite
from hpr.plans.terms import FactorShape, Term, routers_of
from hpr.sharing.embeddings import guard_embeddings
from hpr.sharing.ties import Tie, declared_ties, drop_ties, resolved


def attach(
    model: nn.Module,
    terms_by_path: Mapping[str, Sequence[Term]],
    shapes: Mapping[str, FactorShape],
    aliases: Mapping[str, Sequence[str]] | None = None,
    dtype: torch.dtype | None = None,
    layers: Mapping[str, str] | None = None,
) -> FactorBank:
    """Swap the modules at some sites, in place, for ones that read a new bank on the base model. Factors stay unset.

    ``terms_by_path``: terms by site path, those of all experts of a parameter or of none (see ``share.with_kept``);
    ``shapes``: factor name → shape; ``aliases``: further modules that read a site's factors (modules that are tied to it now
    are found without them). ``dtype`` is that of the first site unless given. ``layers``: path of a block → its state (see
    ``layer_reuse.install``); a module without effect inside such a block has a path with no terms. Works on the meta
    device. Raises ``HprError``, before it changes anything, if a module cannot be replaced.
    """
    base, _ = base_of(model)
    if bank_of(model) is not None:
        raise HprError(f"this {type(model).__name__} has a bank already: attach to a fresh model")
    layers = layers or {}
    gone = [path for path, terms in terms_by_path.items() if not terms]
    if layers or gone:
        from hpr.layer_reuse.install import check, install  # an optional feature: other models never load it

        check(model, layers, gone)
    experts = {path: found for path in terms_by_path if (found := slice_at(model, path)) is not None}
    removed = {path: module_at(model, path) for path in gone}
    sources = {path: module_at(model, path) for path in terms_by_path if path not in experts and path not in removed}
    if not terms_by_path or model in (*sources.values(), *(one.module for one in experts.values())):
        raise HprError(f"no site below {type(model).__name__} to attach to: give the paths of modules inside the model")
    for path, terms in terms_by_path.items():
        if path in removed:
            continue
        check_site(model, path)
        _check_shapes(site_of(path, experts[path]) if path in experts else _site_at(path, sources[path]), terms, shapes)
    first = _first(terms_by_path, experts, {**sources, **removed})
    if layers:
        install(model, layers)
    declared = declared_ties(model)
    ties = resolved(declared)
    owners = _readers(model, sources, aliases or {}, ties)
    with torch.device(first.device):
        bank = FactorBank(shapes, dtype or first.dtype)
        swaps = {module: _shared(bank, terms_by_path[path], module, path) for module, path in owners.items()}
        _set_placeholders(swaps, sources.values(), ties)
        replaced: dict[nn.Module, nn.Module] = {**swaps, **shared_experts(bank, experts, terms_by_path)}
        replaced |= {module: ZeroOutput(bank, module, path) for path, module in removed.items()}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replaced:
                setattr(parent, name, replaced[child])
    routed = [path for path, terms in terms_by_path.items() if routers_of(terms)]
    if routed:
        note_masks(model, bank.routing, routed)
    bank.layers = dict(layers)
    setattr(base, BANK, bank.train(base.training))
    drop_ties(declared)
    guard_embeddings(model)
    _keep_whole(model)
    return bank


def _keep_whole(model: nn.Module) -> None:
    """Let a device map put the bank on one device: accelerate forgets buffers of what it splits."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module._no_split_modules = {*(module._no_split_modules or ()), FactorBank.__name__}


def _first(terms: Mapping[str, Sequence[Term]], experts: Mapping[str, Slice], modules: Mapping[str, nn.Module]) -> Tensor:
    """A weight of the first site, for its dtype and device."""
    path = next(iter(terms))
    return experts[path].weight if path in experts else next(modules[path].parameters())


def _readers(
    model: nn.Module, sources: Mapping[str, nn.Module], aliases: Mapping[str, Sequence[str]], ties: Sequence[Tie]
) -> dict[nn.Module, str]:
    """Module → path of the site whose factors it will read: the sites, their named aliases, and whatever is tied to them.

    Ties are seen by the common parameter or, while transformers loads a model and nothing is tied yet, by declaration.
    """
    owners = {module: path for path, module in sources.items()}
    by_weight = {id(module.weight): path for path, module in sources.items()}
    named = {module_at(model, alias): path for path, others in aliases.items() for alias in others}
    for one, other, name in ties:
        for source, partner in ((one, other), (other, one)):
            if name != "weight" or source not in owners or partner in owners or partner.weight is source.weight:
                continue
            if not source.weight.is_meta:
                raise HprError(
                    f"{owners[source]} is declared as tied to a {type(partner).__name__} but is not: call model.tie_weights(), "
                    f"or set config.tie_word_embeddings=False"
                )
            named[partner] = owners[source]
    for name, module in model.named_modules():
        path = named.get(module) or by_weight.get(id(getattr(module, "weight", None)))
        if path is not None and module not in owners:
            check_replaceable(model, name, module)
            if weight_of(module).shape != weight_of(sources[path]).shape or is_transposed(module) != is_transposed(
                sources[path]
            ):
                raise HprError(f"{name} cannot read the factors of {path}, their sizes or layouts differ: correct the aliases")
            owners[module] = path
    return owners


def _shared(bank: FactorBank, terms: Sequence[Term], source: nn.Module, path: str) -> SharedSite:
    if not isinstance(source, nn.Embedding):
        return (RoutedLinear if routers_of(terms) else SharedLinear)(bank, terms, source, path)
    if type(source).forward is nn.Embedding.forward:
        return SharedEmbedding(bank, terms, source, path)
    kind = _embedding_like(type(source))  # type: ignore[arg-type]  # a class is hashable
    shared = kind.__new__(kind)
    SharedEmbedding.__init__(shared, bank, terms, source, path)
    for name, value in vars(source).items():  # its own settings: a scale, an offset
        if name not in vars(shared):
            setattr(shared, name, value)
    for name, buffer in source.named_buffers(recurse=False):
        shared.register_buffer(name, buffer, persistent=name not in source._non_persistent_buffers_set)
    return shared


def _set_placeholders(swaps: Mapping[nn.Module, SharedSite], sources: Iterable[nn.Module], ties: Sequence[Tie]) -> None:
    """Give placeholder weights the form that transformers expects.

    Those of aliases are not stored, like tied weights. ``tie_weights`` cuts a tied bias to the length of its module's weight,
    so the placeholder there is as long as the bias.
    """
    stored = set(sources)
    long = {module for one, other, name in ties for module in (one, other) if name == "bias"}
    for module, shared in swaps.items():
        placeholder = torch.zeros(shared.out_features if module in long else 1, dtype=shared.weight.dtype)
        shared.register_buffer("weight", placeholder, persistent=module in stored)


class _DelegatedEmbedding(SharedEmbedding, nn.Embedding):
    """What a subclass of ``nn.Embedding`` reaches by ``super().forward``."""


@functools.cache
def _embedding_like(source: Any) -> type[SharedEmbedding]:
    """A class with the forward of ``source`` whose ``super().forward`` looks up factors: scales and offsets stay as they are.

    Transformers goes by the name of ``source`` inside its own to find the non-persistent buffers that it has to fill.
    """
    return type(f"Shared{source.__name__}", (source, _DelegatedEmbedding), {})


def _site_at(path: str, module: nn.Module) -> Site:
    out_features, in_features = weight_of(module).shape
    return Site(path, "linear", out_features, in_features, has_bias=False)


def _check_shapes(site: Site, terms: Sequence[Term], shapes: Mapping[str, FactorShape]) -> None:
    for term in terms:
        for factor, needed in term.shapes(site).items():
            if shapes.get(factor) != needed:
                raise HprError(
                    f"{site.name} needs factor {factor!r} as {tuple(needed)}, its shape is given as {shapes.get(factor)}: "
                    f"plan anew, or load the checkpoint with the model it was made from"
                )


def is_transposed(module: nn.Module) -> bool:
    """Whether a module stores its weight as (in, out)."""
    return isinstance(module, Conv1D)
