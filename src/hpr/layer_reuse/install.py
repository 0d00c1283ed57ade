"""Drop layers of a model, or let them reuse the attention weights or the keys and values of a layer below.

``with_states`` returns a copy of a model with such layers and all its weights, for an intervention. ``dead_weights`` finds the
weights without effect there, ``with_layers`` writes that into a plan, and ``hpr.share`` carries the plan out. Attention modules
are found by their code: they call the attention interface of transformers. They are matched by their path inside the block.
"""

from __future__ import annotations

import ast
import copy
import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from hpr.anatomy.describe import describe
from hpr.anatomy.lookup import module_at
from hpr.anatomy.model import Anatomy
from hpr.anatomy.source_code import attribute_of_self, functions_of, names_in, tree_of
from hpr.errors import HprError
from hpr.layer_reuse.attention import Clearing, Holder, attention_modules, role_of
from hpr.plans.layer_states import DROPPED, STATES, WEIGHTS, check_states, paths_of, source


def with_states(model: nn.Module, states: Mapping[str, str]) -> nn.Module:
    """A copy of a model whose layers have some states. It reads the weights of the original, which is not changed.

    ``states``: layer name (``encoder.3``) → ``"dropped"``, ``"attention reused"`` or ``"keys and values reused"``. Weights
    without effect are still in the copy. Raises ``HprError`` for unknown layers and states, and for layers that cannot change.
    """
    anatomy = describe(model)
    check_states(states, {stack.name: stack.layers for stack in anatomy.stacks})
    student = reading_the_same(model)
    install(student, paths_of(anatomy, states))
    return student


def reading_the_same(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy of a model that reads the weights of the original, cast if a ``dtype`` is given; its gradients are separate."""

    def parameter(own: nn.Parameter) -> nn.Parameter:
        kept = own.detach() if dtype is None or not own.is_floating_point() else own.detach().to(dtype)
        return nn.Parameter(kept, own.requires_grad)

    memo: dict[int, Any] = {id(own): parameter(own) for own in model.parameters()}
    memo |= {id(own): own if dtype is None or not own.is_floating_point() else own.to(dtype) for own in model.buffers()}
    return copy.deepcopy(model, memo)


def install(model: nn.Module, layers: Mapping[str, str]) -> None:
    """Give layers their states, in place: drop blocks, and connect attention modules. ``layers``: path of a block → its state.

    The remaining blocks keep their numbers, so the names of weights and the positions in caches do not change. Raises
    ``HprError``, before anything is changed, if a layer cannot have its state.
    """
    check(model, layers)
    for path, states in _by_container(layers).items():
        container = module_at(model, path)
        for number, state in states.items():
            if state == DROPPED:
                del container._modules[str(number)]
        holders = _connect(container, path, states)
        if holders:
            _owner(model, path).register_forward_pre_hook(Clearing(holders))


def check(model: nn.Module, layers: Mapping[str, str], removed: Iterable[str] = ()) -> None:
    """Raise ``HprError`` if a layer is not there or cannot have its state; ``layers`` as for ``install``.

    ``removed``: paths of modules that have no effect any more. They must be inside the attention of a layer that reuses.
    """
    for path, states in _by_container(layers).items():
        _check(model, path, states)
    reusing = [block for block, state in layers.items() if state != DROPPED]
    for path in removed:
        if not any(path.startswith(f"{attention}.") for block in reusing for attention in attention_at(model, block)):
            raise HprError(
                f"{path} is said to have no effect, but its layer attends by itself: give it terms, or plan to keep it"
            )


def reusable(model: nn.Module, anatomy: Anatomy) -> dict[str, str | None]:
    """Layer name → why it cannot reuse attention weights, or keys and values; None if it can."""
    return {
        f"{stack.name}.{layer}": _why_no_reuse(model, stack.path, layer)
        for stack in anatomy.stacks
        for layer in range(stack.layers)
    }


def droppable(model: nn.Module, anatomy: Anatomy) -> dict[str, str | None]:
    """Layer name → why it cannot be dropped; None if it can."""
    return {
        f"{stack.name}.{layer}": _why_no_drop(model, stack.path, layer)
        for stack in anatomy.stacks
        for layer in range(stack.layers)
    }


def attention_at(model: nn.Module, path: str) -> dict[str, nn.Module]:
    """Attention modules inside the block at a path, by their paths."""
    found = attention_modules(module_at(model, path))
    return {f"{path}.{inner}" if inner else path: module for inner, module in found.items()}


def _by_container(layers: Mapping[str, str]) -> dict[str, dict[int, str]]:
    found: dict[str, dict[int, str]] = defaultdict(dict)
    for path, state in layers.items():
        container, _, number = path.rpartition(".")
        if not number.isdigit():
            raise HprError(f"{path!r} is no block of a stack: its path ends in a number")
        if state not in STATES:
            raise HprError(f"{path}: {state!r} is no state of a layer; there are {', '.join(STATES)}")
        found[container][int(number)] = state
    return {container: dict(sorted(states.items())) for container, states in found.items()}


def _check(model: nn.Module, path: str, states: Mapping[int, str]) -> None:
    container = module_at(model, path)
    types = _attention_types(_owner(model, path))
    for number, state in states.items():
        if str(number) not in container._modules:
            raise HprError(
                f"{path or type(container).__name__} has no layer {number}: the plan or checkpoint is of another model"
            )
        why = (_why_no_drop if state == DROPPED else _why_no_reuse)(model, path, number)
        if why is not None:
            raise HprError(f"layer {number} of {path} cannot be {state!r}: {why}; let it be its own")
        if state == DROPPED:
            continue
        below = source(states, number)
        if below is None:
            raise HprError(
                f"layer {number} of {path} cannot be {state!r}: no layer below has what it would take; let one be its own"
            )
        if types is not None and types[below] != types[number]:
            raise HprError(
                f"layer {number} of {path} cannot be {state!r}: it attends as {types[number]!r}, layer {below} as "
                f"{types[below]!r}; let it be its own"
            )


def _connect(container: nn.Module, path: str, states: Mapping[int, str]) -> list[Holder]:
    last: dict[Holder, Any] = {}
    for number, state in states.items():
        below = source(states, number)
        if state == DROPPED or below is None:
            continue
        givers = attention_modules(container.get_submodule(str(below)))
        for inner, module in attention_modules(container.get_submodule(str(number))).items():
            giver, taker = role_of(givers[inner], f"{path}.{below}"), role_of(module, f"{path}.{number}")
            kind = "weights" if state == WEIGHTS else "keys"
            holder = getattr(giver, f"gives_{kind}") or Holder()
            setattr(giver, f"gives_{kind}", holder)
            setattr(taker, f"takes_{kind}", holder)
            last[holder] = taker
    for holder, taker in last.items():
        taker.last.append(holder)
    return list(last)


def _why_no_reuse(model: nn.Module, path: str, layer: int) -> str | None:
    blocks = module_at(model, path)._modules
    block, below = blocks[str(layer)], blocks.get(str(layer - 1))
    assert block is not None
    own = attention_modules(block)
    if not own:
        return f"{type(block).__name__} attends past transformers' attention interface"
    if below is None:
        return "there is no layer below"
    if {inner: type(module) for inner, module in own.items()} != {
        inner: type(module) for inner, module in attention_modules(below).items()
    }:
        return "the layer below attends in another way"
    types = _attention_types(_owner(model, path))
    if types is not None and types[layer] != types[layer - 1]:
        return f"it attends as {types[layer]!r}, the layer below as {types[layer - 1]!r}"
    return None


def _why_no_drop(model: nn.Module, path: str, layer: int) -> str | None:
    blocks = module_at(model, path)._modules
    block, owner = blocks[str(layer)], _owner(model, path)
    assert block is not None
    if layer == min(int(name) for name in blocks if name.isdigit()):
        return "the lowest layer counts the positions in the cache, and may hold tensors that all others read"
    types = _attention_types(owner)
    if types is not None and len(set(types)) > 1:
        return f"{type(owner).__name__} attends in different ways by the number of the layer"
    if (attribute := path.rpartition(".")[2]) and _indexes(type(owner), attribute):  # type: ignore[arg-type]  # a class is hashable
        return f"{type(owner).__name__} picks layers by number"
    own, inside = {id(parameter) for parameter in block.parameters()}, {id(module) for module in block.modules()}
    for module in model.modules():
        if id(module) not in inside and any(id(parameter) in own for parameter in module.parameters(recurse=False)):
            return "some of its weights are tied to weights outside"
    return None


def _owner(model: nn.Module, path: str) -> nn.Module:
    """The module that runs the blocks of a container: the one that it is an attribute of, or a ``Sequential`` itself."""
    container = module_at(model, path)
    if isinstance(container, nn.Sequential) or not path:
        return container
    return module_at(model, path.rpartition(".")[0])


def _attention_types(owner: nn.Module) -> list[str] | None:
    types = getattr(getattr(owner, "config", None), "layer_types", None)
    return None if types is None else list(types)


@functools.cache
def _indexes(kind: Any, attribute: str) -> bool:
    """Whether the code of a class picks from a container by number; slices are harmless.

    If the source of a method that mentions the container cannot be found, it may: True, and ``tree_of`` logs it.
    """
    for _, function in functions_of(kind):
        if attribute in names_in(function):
            tree = tree_of(function)
            if tree is None:
                return True
            picked = (
                node for node in ast.walk(tree) if isinstance(node, ast.Subscript) and not isinstance(node.slice, ast.Slice)
            )
            if any(attribute_of_self(node.value) == attribute for node in picked):
                return True
    return False
