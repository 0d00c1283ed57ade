"""Share and unshare: the only code that operates on a model.

``attach`` puts a bank on the base model and swaps each site's module for one that reads its factors from there; ``share``
does that to a copy of a model and fills in the fitted factors; ``unshare`` goes back to stock dense modules.
A module that holds the very parameter of a site (a head tied to the embedding) reads the same factors; see ``hpr.ties``.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hpr import operators
from hpr.alignment import align
from hpr.anatomy import Anatomy, Site, base_of, describe, module_at, slice_at, weight_at, weight_of
from hpr.bank import BANK, FactorBank, bank_of, factors_of
from hpr.errors import HprError
from hpr.evaluation.sizes import parameters
from hpr.experts import SharedExperts, shared_experts, site_of, with_kept
from hpr.planning.plan import Plan
from hpr.planning.terms import KEEP, FactorShape, Term, routers_of
from hpr.replaceable import check_replaceable, check_site, unshareable
from hpr.reuse import check, install, paths_of
from hpr.routing import forget_masks, note_masks
from hpr.sites import SharedEmbedding, SharedLinear, SharedSite, is_specification, specification
from hpr.slices import Slice
from hpr.ties import Tie, declared_ties, drop_ties, resolved, restore_ties
from hpr.vanished import SomeRows, Vanished, check_vanished, only_rows, vanished_paths

if TYPE_CHECKING:
    from hpr.profiling.profile import Profile


class Rule(Protocol):
    """What says which layers share without measuring: a preset, or replication rules. Its factors are weights of the model."""

    @property
    def name(self) -> str: ...

    def plan(self, model: nn.Module) -> Plan: ...

    def fit(self, model: nn.Module, anatomy: Anatomy, plan: Plan) -> operators.Fitted: ...


def share(model: nn.Module, plan: Plan | Rule, profile: Profile | None = None) -> nn.Module:
    """A copy of ``model`` whose sites read shared factors as the plan says; the model itself is untouched.

    Sites that are kept stay as they are: the identity plan gives a plain copy. Training mode, device and dtype are those
    of the model. With a rule (``hpr.presets``, for training from scratch) nothing is fitted: each factor starts as the
    weight of its group's first layer. Raises ``HprError`` where the plan does not fit, the model is already shared or
    quantised, a rule comes with a profile, or a fitted factor is missing, of another shape or not finite.
    """
    if bank_of(model) is not None:
        raise HprError(f"this {type(model).__name__} is shared already: plan on its original, or on hpr.unshare of it")
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        raise HprError(f"this {type(model).__name__} is quantised: load it without quantization_config, share, then quantise")
    rule = None if isinstance(plan, Plan) else plan
    if rule is not None and profile is not None:
        raise HprError(f"{rule} takes no profile, since it fits nothing: leave it out, or share {rule.name}'s plan(model)")
    plan = plan if isinstance(plan, Plan) else plan.plan(model)
    anatomy = describe(model)
    plan.validate(anatomy)
    changed = {name: entry.terms for name, entry in plan.entries.items() if entry.terms}
    if not changed and not plan.layers:
        return copy.deepcopy(model)
    if plan.alignment:
        if profile is None:
            raise HprError("the plan turns layers before they share, which takes the profile it was made with: give that, too")
        student, profile, _ = align(model, profile, plan.alignment)
        fitted = operators.fit(student, describe(student), plan, profile)
    else:
        student = copy.deepcopy(model)
        fitted = operators.fit(model, anatomy, plan, profile) if rule is None else rule.fit(model, anatomy, plan)
    _check_finite(changed, fitted)
    by_path = {anatomy[name].path: terms for name, terms in changed.items()}
    terms, shapes, kept = with_kept(student, by_path, plan.factors(anatomy))
    terms |= dict.fromkeys(vanished_paths(anatomy, plan), ())
    if not terms:
        path, shapes, kept = _guard(student, anatomy, plan)
        terms = {path: tuple(Term(factor) for factor in shapes)}
    aliases = {anatomy[name].path: anatomy[name].aliases for name in changed}
    bank = attach(student, terms, shapes, aliases, layers=paths_of(anatomy, plan.layers))
    bank.load({**fitted.factors, **kept})
    for name, change in fitted.bias_changes.items():
        if anatomy[name].has_bias:
            bias: Tensor = module_at(student, anatomy[name].path).bias  # type: ignore[assignment]
            bias.data += change.to(bias)
    if isinstance(student, PreTrainedModel):
        student.config.quantization_config = specification(student)
    if plan.layers and (count := parameters(student)) != plan.parameters(anatomy):
        raise HprError(
            f"the plan counts {plan.parameters(anatomy):,} parameters, the model made from it has {count:,}: what it says of "
            f"removed parameters is not so; take it from hpr.vanishing.vanishing"
        )
    return student


def attach(
    model: nn.Module,
    terms_by_path: Mapping[str, Sequence[Term]],
    shapes: Mapping[str, FactorShape],
    aliases: Mapping[str, Sequence[str]] | None = None,
    dtype: torch.dtype | None = None,
    layers: Mapping[str, str] | None = None,
) -> FactorBank:
    """Swap the modules at some sites, in place, for ones that read a new bank on the base model. Factors stay unset.

    ``terms_by_path``: terms by site path, those of all experts of a parameter or of none (see ``experts.with_kept``);
    ``shapes``: factor name → shape; ``aliases``: further modules that read a site's factors (those tied to it now are found
    by themselves). ``dtype`` is that of the first site unless given. ``layers``: path of a block → its state (see
    ``reuse.install``); a module inside such a block that has lost its effect has a path with no terms. Works on the meta
    device. Raises ``HprError``, before anything is changed, where a module cannot be replaced.
    """
    base, _ = base_of(model)
    if bank_of(model) is not None:
        raise HprError(f"this {type(model).__name__} has a bank already: attach to a fresh model")
    check(model, layers or {})
    experts = {path: found for path in terms_by_path if (found := slice_at(model, path)) is not None}
    vanished = {path: module_at(model, path) for path, terms in terms_by_path.items() if not terms}
    sources = {path: module_at(model, path) for path in terms_by_path if path not in experts and path not in vanished}
    if not terms_by_path or model in (*sources.values(), *(one.module for one in experts.values())):
        raise HprError(f"no site below {type(model).__name__} to attach to: give the paths of modules inside the model")
    for path in vanished:
        check_vanished(model, path, layers or {})
    for path, terms in terms_by_path.items():
        if path in vanished:
            continue
        check_site(model, path)
        _check_shapes(site_of(path, experts[path]) if path in experts else _site_at(path, sources[path]), terms, shapes)
    first = _first(terms_by_path, experts, {**sources, **vanished})
    install(model, layers or {})
    declared = declared_ties(model)
    ties = resolved(declared)
    owners = _readers(model, sources, aliases or {}, ties)
    with torch.device(first.device):
        bank = FactorBank(shapes, dtype or first.dtype)
        swaps = {module: _shared(bank, terms_by_path[path], module, path) for module, path in owners.items()}
        _set_guards(swaps, sources.values(), ties)
        replaced: dict[nn.Module, nn.Module] = {**swaps, **shared_experts(bank, experts, terms_by_path)}
        replaced |= {module: Vanished(bank, module, path) for path, module in vanished.items()}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replaced:
                setattr(parent, name, replaced[child])
    routed = [path for path, terms in terms_by_path.items() if routers_of(terms)]
    if routed:
        note_masks(model, bank.routing, routed)
    bank.layers = dict(layers or {})
    setattr(base, BANK, bank.train(base.training))
    drop_ties(declared)
    return bank


def unshare(student: nn.Module) -> nn.Module:
    """A copy with stock dense modules again: the same classes, biases, dtype, device and ties as before ``share``.

    What it saves loads in plain transformers, at the dense size. Raises ``HprError``, naming the layers, where layers were
    dropped or reuse what those below compute, or where weights depend on the input: no stock weights give that.
    """
    bank = bank_of(student)
    if bank is not None and bank.layers:
        named = ", ".join(f"{path} ({state})" for path, state in bank.layers.items())
        raise HprError(f"no stock {type(student).__name__} computes what this one does, because of {named}: keep it shared")
    dense = copy.deepcopy(student)
    weights: dict[str, nn.Parameter] = {}  # by site, so that a tied head holds the embedding's own parameter again
    restored: dict[nn.Module, nn.Module] = {}
    for parent in list(dense.modules()):
        for name, child in list(parent._modules.items()):
            if isinstance(child, SharedSite | SharedExperts):
                if child not in restored:
                    restored[child] = _stock(child, weights) if isinstance(child, SharedSite) else child.stock()
                setattr(parent, name, restored[child])
    base, _ = base_of(dense)
    if bank_of(dense) is not None:
        delattr(base, BANK)
    forget_masks(dense)
    restore_ties(dense)
    config = getattr(dense, "config", None)
    if isinstance(dense, PreTrainedModel) and is_specification(getattr(config, "quantization_config", None)):
        del dense.config.quantization_config
    return dense


def _guard(model: nn.Module, anatomy: Anatomy, plan: Plan) -> tuple[str, dict[str, FactorShape], dict[str, Tensor]]:
    """A kept site for the bank to hold as it is: its placeholder makes loading without hpr fail where nothing else would."""
    fixed = unshareable(model, anatomy)
    for site in anatomy.sites:
        kept = plan.entries[site.name].operator == KEEP and site.name not in fixed
        if kept and site.kind == "linear" and site.expert is None:
            factor = f"{site.name}.kept"
            shape = FactorShape(site.out_features, site.in_features)
            return site.path, {factor: shape}, {factor: weight_at(model, site).detach()}
    raise HprError("no Linear weight is kept that could tell of the layers on loading: drop fewer layers")


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
            if weight_of(module).shape != weight_of(sources[path]).shape or _transposed(module) != _transposed(sources[path]):
                raise HprError(f"{name} cannot read the factors of {path}, their sizes or layouts differ: correct the aliases")
            owners[module] = path
    return owners


def _shared(bank: FactorBank, terms: Sequence[Term], source: nn.Module, path: str) -> SharedSite:
    if not isinstance(source, nn.Embedding):
        return (SomeRows if only_rows(terms) else SharedLinear)(bank, terms, source, path)
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


def _set_guards(swaps: Mapping[nn.Module, SharedSite], sources: Iterable[nn.Module], ties: Sequence[Tie]) -> None:
    """Fit the placeholder weights to what transformers does with them.

    Those of aliases are not stored, just as tied weights are not. Where a bias is tied to another module's, ``tie_weights``
    cuts it to the length of the weight beside it, which therefore is that of the bias.
    """
    stored = set(sources)
    long = {module for one, other, name in ties for module in (one, other) if name == "bias"}
    for module, shared in swaps.items():
        guard = torch.zeros(shared.out_features if module in long else 1, dtype=shared.weight.dtype)
        shared.register_buffer("weight", guard, persistent=module in stored)


class _DelegatedEmbedding(SharedEmbedding, nn.Embedding):
    """Stands where a subclass of ``nn.Embedding`` expects ``super().forward``."""


@functools.cache
def _embedding_like(source: Any) -> type[SharedEmbedding]:
    """A class with the forward of ``source`` whose ``super().forward`` looks up factors: scales and offsets stay as they are.

    The name keeps that of ``source``, by which transformers finds the non-persistent buffers it has to fill in.
    """
    return type(f"Shared{source.__name__}", (source, _DelegatedEmbedding), {})


def _site_at(path: str, module: nn.Module) -> Site:
    out_features, in_features = weight_of(module).shape
    return Site(path, path, "linear", out_features, in_features, has_bias=False)


def _check_shapes(site: Site, terms: Sequence[Term], shapes: Mapping[str, FactorShape]) -> None:
    for term in terms:
        for factor, needed in term.shapes(site).items():
            if shapes.get(factor) != needed:
                raise HprError(
                    f"{site.path} needs factor {factor!r} as {tuple(needed)}, its shape is given as {shapes.get(factor)}: "
                    f"plan anew, or load the checkpoint with the model it was made from"
                )


def _check_finite(changed: Mapping[str, Sequence[Term]], fitted: operators.Fitted) -> None:
    for name, terms in changed.items():
        parts = {factor: fitted.factors.get(factor) for factor in factors_of(terms)}
        for part, values in {**parts, "bias change": fitted.bias_changes.get(name)}.items():
            if values is not None and not torch.isfinite(values).all():
                raise HprError(f"{name}: its {part} is not finite: check the calibration data, or keep this site")


def _stock(shared: SharedSite, weights: dict[str, nn.Parameter]) -> nn.Module:
    """The dense module that a shared one replaced, with the weight that its factors add up to."""
    module = copy.deepcopy(shared.shell)
    if shared.path not in weights:
        weight = shared.dense_weight().detach()
        weight = weight.T.contiguous() if _transposed(module) else weight
        weights[shared.path] = nn.Parameter(weight, requires_grad=bool(module.weight.requires_grad))
    module.weight = weights[shared.path]
    if isinstance(shared, SharedLinear):
        module.register_parameter("bias", shared.bias)
    for name, buffer in shared.named_buffers(recurse=False):
        if name != "weight":
            module._buffers[name] = buffer
    return module.train(shared.training)


def _transposed(module: nn.Module) -> bool:
    """Whether a module stores its weight as (in, out)."""
    return isinstance(module, Conv1D)
