"""Methods of transformers models that read or change the table: they refuse to give a shared one other rows, and count it."""

from __future__ import annotations

import types
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from hpr.errors import HprError
from hpr.nn.embedding import SharedEmbedding
from hpr.nn.site import SharedSite
from hpr.plans.terms import factors_of

_MEND = "do it on hpr.unshare(model), or on the original, and compress that again"


def guard_embeddings(model: nn.Module) -> None:
    """Let methods of every transformers model inside know of shared tables: those that change the table or head refuse.

    They are set on the instances, as methods, so that a copy of the model has them, too.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            for method in _METHODS:
                setattr(module, method.__name__, types.MethodType(method, module))


def release_embeddings(model: nn.Module) -> None:
    """Undo ``guard_embeddings``."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            for method in _METHODS:
                vars(module).pop(method.__name__, None)


def resize_token_embeddings(self: PreTrainedModel, new_num_tokens: int | None = None, *args: Any, **kwargs: Any) -> Any:
    """As in transformers, if the table and the head are plain, or the number of tokens stays as it is."""
    shared = [part for part in (_input(self), _output(self)) if isinstance(part, SharedSite)]
    if not shared:
        return type(self).resize_token_embeddings(self, new_num_tokens, *args, **kwargs)
    sizes = {part.num_embeddings if isinstance(part, SharedEmbedding) else part.out_features for part in shared}
    if new_num_tokens is None or sizes == {new_num_tokens}:
        return _input(self)
    raise HprError(
        f"{shared[0].path} of this {type(self).__name__} is shared, so its {max(sizes)} rows cannot become {new_num_tokens}: "
        f"{_MEND}"
    )


def set_input_embeddings(self: PreTrainedModel, value: nn.Module) -> None:
    """As in transformers, if the table is plain."""
    _refuse(self, _input(self), "table")
    type(self).set_input_embeddings(self, value)


def set_output_embeddings(self: PreTrainedModel, new_embeddings: nn.Module) -> None:
    """As in transformers, if the head is plain."""
    _refuse(self, _output(self), "head")
    type(self).set_output_embeddings(self, new_embeddings)


def num_parameters(self: PreTrainedModel, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
    """As in transformers: unique parameters, or those that are trained; without tables also without what shared tables read."""
    counted = type(self).num_parameters(self, only_trainable, exclude_embeddings)
    if not exclude_embeddings:
        return counted
    tables = [module for module in self.modules() if isinstance(module, SharedEmbedding)]
    weights = {name: table.bank.stored(name).weight for table in tables for name in factors_of(table.terms)}
    return counted - sum(weight.numel() for weight in weights.values() if weight.requires_grad or not only_trainable)


_METHODS = (resize_token_embeddings, set_input_embeddings, set_output_embeddings, num_parameters)


def _refuse(model: PreTrainedModel, part: nn.Module | None, what: str) -> None:
    if isinstance(part, SharedSite):
        raise HprError(f"{part.path} of this {type(model).__name__} is shared, so no other {what} can be set: {_MEND}")


def _input(model: PreTrainedModel) -> nn.Module | None:
    try:
        return model.get_input_embeddings()
    except (AttributeError, NotImplementedError):  # a model of images or sound has no such table
        return None


def _output(model: PreTrainedModel) -> nn.Module | None:
    try:
        return model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        return None
