"""Turn a shared model back into stock dense weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn

from hpr.anatomy.lookup import base_of
from hpr.anatomy.wrappers import unwrapped
from hpr.errors import HprError
from hpr.nn.bank import BANK, bank_of
from hpr.nn.coded import attach_codes
from hpr.nn.experts import SharedExperts
from hpr.nn.integers import keep_floats
from hpr.nn.linear import SharedLinear
from hpr.nn.router import forget_masks
from hpr.nn.site import SharedSite
from hpr.sharing.attach import is_transposed
from hpr.sharing.embeddings import release_embeddings
from hpr.sharing.specification import forget_specification
from hpr.sharing.ties import restore_ties


def unshare(student: nn.Module) -> nn.Module:
    """A copy with stock dense modules again: the same classes, biases, dtype, device and ties as before ``share``.

    Of a coded model it is a copy without its codes, which may be trained.

    What it saves loads in plain transformers, at the dense size. Raises ``HprError``, naming the layers, where layers were
    dropped or reuse what those below compute, or where weights depend on the input: no stock weights give that.

    >>> dense = hpr.unshare(student)
    >>> dense.save_pretrained(folder / "dense")
    """
    return unshared(student, stock)


def unshared(student: nn.Module, made: Callable[[SharedSite, dict[str, nn.Parameter]], nn.Module]) -> nn.Module:
    """The same, with what ``made`` returns for a shared module and the dense weights so far, by site."""
    student = unwrapped(student)
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
                    restored[child] = made(child, weights) if isinstance(child, SharedSite) else child.stock()
                setattr(parent, name, restored[child])
    base, _ = base_of(dense)
    if bank_of(dense) is not None:
        delattr(base, BANK)
    keep_floats(dense)
    attach_codes(dense, {}, None)
    forget_masks(dense)
    restore_ties(dense)
    release_embeddings(dense)
    forget_specification(dense)
    return dense


def stock(shared: SharedSite, weights: dict[str, nn.Parameter]) -> nn.Module:
    """The dense module that a shared one replaced, with the weight that its factors add up to."""
    module = copy.deepcopy(shared.template)
    if shared.path not in weights:
        weight = shared.dense_weight().detach()
        weight = weight.T.contiguous() if is_transposed(module) else weight
        weights[shared.path] = nn.Parameter(weight, requires_grad=bool(module.weight.requires_grad))
    module.weight = weights[shared.path]
    if isinstance(shared, SharedLinear):
        module.register_parameter("bias", shared.bias)
    for name, buffer in shared.named_buffers(recurse=False):
        if name != "weight":
            module._buffers[name] = buffer
    return module.train(shared.training)
