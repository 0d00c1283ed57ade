"""The ties that models of transformers declare, and how they change if a tied weight is shared.

Only the instance is changed: ``config.tie_word_embeddings`` keeps its value, because some models scale their output by it,
and because a checkpoint moves between classes that declare different ties.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from transformers import PreTrainedModel

from hpr.nn.site import SharedSite

Tie = tuple[nn.Module, nn.Module, str]  # two modules, and the name of the parameter that they have in common
Declared = list[tuple[PreTrainedModel, dict[str, str]]]
_BEFORE = "_hpr_declared_ties"  # where a model keeps the tie keys that it had before


def declared_ties(model: nn.Module) -> Declared:
    """Every transformers model inside with the ties its class and configuration ask for, patterns expanded."""
    inside = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return [(module, module.get_expanded_tied_weights_keys(all_submodels=False)) for module in inside]


def resolved(declared: Declared) -> list[Tie]:
    """The same ties as pairs of modules."""
    keys = [(model, one.rpartition("."), other.rpartition(".")) for model, ties in declared for one, other in ties.items()]
    return [(model.get_submodule(one[0]), model.get_submodule(other[0]), one[2]) for model, one, other in keys]


def drop_ties(declared: Declared) -> None:
    """Take the ties of shared weights off the instances, so that ``tie_weights`` passes them by; all others stay."""
    for model, ties in declared:
        all_keys = getattr(model, "all_tied_weights_keys", None)  # missing where a model's code leaves out its post_init
        setattr(model, _BEFORE, (model._tied_weights_keys, all_keys))
        if ties:
            model._tied_weights_keys = _without_shared(model, ties)
        if all_keys is not None:
            model.all_tied_weights_keys = _without_shared(model, all_keys)


def restore_ties(model: nn.Module) -> None:
    """Undo ``drop_ties``."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and hasattr(module, _BEFORE):
            module._tied_weights_keys, all_keys = getattr(module, _BEFORE)
            if all_keys is not None:
                module.all_tied_weights_keys = all_keys
            delattr(module, _BEFORE)


def _without_shared(model: nn.Module, ties: Mapping[str, str]) -> dict[str, str]:
    def stays(key: str) -> bool:
        path, _, name = key.rpartition(".")
        return name != "weight" or not isinstance(model.get_submodule(path), SharedSite)

    return {target: source for target, source in ties.items() if stays(target) and stays(source)}
