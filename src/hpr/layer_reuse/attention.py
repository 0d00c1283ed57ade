"""Attention whose weights, or keys and values, are passed to layers above: one function in transformers' attention interface.

Each attention module that gives or takes has a copy of its ``config`` that names this function. So the configuration of the
model, its masks and all other layers stay the same. The function computes the same as ``eager`` or ``sdpa``, depending on the
current setting of the model.
"""

from __future__ import annotations

import copy
import functools
import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_flash_attention_utils import FlashAttentionKwargs
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import TransformersKwargs

from hpr.anatomy.source_code import names_in
from hpr.errors import HprError

NAME = "hpr_reuse"
_ROLE = "hpr_role"
_IMPLEMENTATIONS = (None, "eager", "sdpa")
_WITHOUT_EFFECT = {  # on eager and sdpa: the mask holds what they say
    *TransformersKwargs.__annotations__,
    *FlashAttentionKwargs.__annotations__,
    *("cache_position", "deterministic", "encoder_attention_mask", "encoder_hidden_states", "is_causal", "output_attentions"),
    *("position_embeddings", "position_ids", "return_dict", "sliding_window", "use_cache"),
}


class _Held:
    """A value that can be given up from any thread."""

    def __init__(self, value: Any) -> None:
        self.value = value


class Holder:
    """What one attention module hands to those above it during a forward pass; each thread sees its own.

    A value is given up once its gradient is complete: then all modules above have been through their backward pass, and none
    asks again. Copies start empty. ``_traced`` serves compiled code, which cannot follow what belongs to a thread, and the
    threads of autograd, which run a forward pass again if activations are checkpointed.
    """

    def __init__(self) -> None:
        self._local = threading.local()
        self._traced: Any = None

    def put(self, value: Any) -> None:
        """Keep a tensor, a tuple of tensors, or None."""
        self._traced = value
        if torch.compiler.is_compiling():
            return
        self._local.held = held = _Held(value)
        first = value[0] if isinstance(value, tuple) else value
        if isinstance(first, Tensor) and first.requires_grad:
            first.register_hook(functools.partial(_give_up, weakref.ref(self), weakref.ref(held)))

    def get(self) -> Any:
        """What was put last; None after ``clear`` and after the backward pass."""
        if torch.compiler.is_compiling():
            return self._traced
        held: _Held | None = getattr(self._local, "held", None)
        return self._traced if held is None else held.value

    def clear(self) -> None:
        self.put(None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Holder:
        return Holder()

    def __reduce__(self) -> tuple[type[Holder], tuple[()]]:
        return Holder, ()


def _give_up(holder: weakref.ref[Holder], held: weakref.ref[_Held], gradient: Tensor) -> None:
    """A hook for the gradient of what was put; it must not keep alive what it is a hook of."""
    mine, owner = held(), holder()
    if mine is not None:
        if owner is not None and owner._traced is mine.value:
            owner._traced = None
        mine.value = None


@dataclass
class Role:
    """What an attention module gives and takes. ``config`` is the one of the model, with its current attention implementation.

    ``last``: the holders that no layer above reads.
    """

    config: Any
    layer: str
    gives_weights: Holder | None = None
    gives_keys: Holder | None = None
    takes_weights: Holder | None = None
    takes_keys: Holder | None = None
    last: list[Holder] = field(default_factory=list)


class Clearing:
    """A forward pre-hook on the module that runs a stack. It clears holders, so no pass reads tensors of an earlier one."""

    def __init__(self, holders: list[Holder]):
        self.holders = holders

    def __call__(self, module: nn.Module, inputs: Any) -> None:
        for holder in self.holders:
            holder.clear()


def attention_modules(block: nn.Module) -> dict[str, nn.Module]:
    """Path inside a block → module that attends through transformers' attention interface."""
    return {
        path: module
        for path, module in block.named_modules()
        if _uses_interface(type(module)) and hasattr(module, "config")  # type: ignore[arg-type]  # a class is hashable
    }


def role_of(module: nn.Module, layer: str) -> Role:
    """The role of an attention module; if it has none, it gets one and from now on computes ``attend``."""
    role: Role | None = getattr(module, _ROLE, None)
    if role is None:
        role = Role(module.config, layer)
        own = copy.copy(role.config)
        own._attn_implementation_internal = NAME  # type: ignore[union-attr]
        module.config = own
        setattr(module, _ROLE, role)
    return role


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """Queries (B, heads, T, d), keys and values (B, groups, S, d) → outputs (B, T, heads, d), weights (B, heads, T, S).

    Raises ``HprError`` if the attention implementation is neither ``eager`` nor ``sdpa``, if a keyword may ask for something
    that is not computed here, and if there is nothing to take.
    """
    role = _checked_role(module, others)
    sdpa = role.config._attn_implementation == "sdpa"
    if role.takes_keys is not None:
        key, value = (one.to(query.device) for one in _take(role, role.takes_keys))
    if role.gives_keys is not None:
        role.gives_keys.put((key, value))
    if role.takes_weights is not None:
        weights = _take(role, role.takes_weights).to(value.device)
    elif role.gives_weights is None and sdpa and softcap is None:
        more = {"dropout": dropout, "scaling": scaling, "is_causal": is_causal, "position_bias": position_bias}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)  # type: ignore[arg-type]
    else:
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        if sdpa and causal and attention_mask is None and query.shape[2] > 1:  # as sdpa_attention_forward has it
            length = query.shape[2]
            key = key[:, :, :length]
            attention_mask = torch.ones(length, length, dtype=torch.bool, device=query.device).tril()
            position_bias = None if position_bias is None else position_bias[..., :length]
        weights = attention_weights(query, key, attention_mask, scaling, position_bias, softcap)
        if role.gives_weights is not None:
            role.gives_weights.put(weights)
    used = F.dropout(weights, dropout, module.training)
    output = _grouped(used, value[:, :, : weights.shape[-1]])
    return output.transpose(1, 2).contiguous(), weights


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)


def attention_weights(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """softmax(scaling · Q Kᵀ + bias + mask): (B, heads, T, d), (B, groups, S, d) → (B, heads, T, S).

    ``mask`` is boolean (True: attended to) or is added. A row with nothing to attend to has equal weights, as in ``eager``.
    """
    scores = _grouped(query * (query.shape[-1] ** -0.5 if scaling is None else scaling), key.transpose(2, 3))
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    if position_bias is not None:
        scores = _added(scores, position_bias)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill_(~mask, torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = _added(scores, mask)
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)


def _added(scores: Tensor, more: Tensor) -> Tensor:
    """The sum, in place if it has the shape and type of the scores, because they are the largest tensor of a layer."""
    fits = torch.broadcast_shapes(scores.shape, more.shape) == scores.shape and more.dtype == scores.dtype
    return scores.add_(more) if fits else scores + more


def _grouped(left: Tensor, right: Tensor) -> Tensor:
    """The product of (B, heads, T, a) and (B, groups, a, b), each group of heads with its own: (B, heads, T, b)."""
    heads, groups = left.shape[1], right.shape[1]
    if heads == groups:
        return left @ right
    rows = left.unflatten(1, (groups, heads // groups)).flatten(2, 3)
    return (rows @ right).unflatten(2, (heads // groups, left.shape[2])).flatten(1, 2)


def _checked_role(module: nn.Module, others: Mapping[str, Any]) -> Role:
    role: Role | None = getattr(module, _ROLE, None)
    if role is None:
        raise HprError(f"{NAME!r} is for layers that reuse attention: call model.set_attn_implementation('sdpa') or 'eager'")
    implementation = role.config._attn_implementation
    if implementation not in _IMPLEMENTATIONS:
        raise HprError(
            f"layer {role.layer} gives or takes attention weights, which {implementation!r} attention has not: "
            f"call model.set_attn_implementation('sdpa') or 'eager'"
        )
    for name, value in others.items():
        if value is not None and name not in _WITHOUT_EFFECT:
            raise HprError(
                f"{type(module).__name__} of layer {role.layer} passes {name!r} to its attention, of which hpr does not know "
                f"what it does: plan without attention reuse for this model"
            )
    return role


def _take(role: Role, holder: Holder) -> Any:
    found = holder.get()
    if found is None:
        raise HprError(
            f"layer {role.layer} finds nothing to reuse, since the layer below did not run: set layerdrop to 0, "
            f"and use_reentrant to False for gradient checkpointing"
        )
    if holder in role.last and not torch.is_grad_enabled():  # with gradients, checkpointing may ask once more
        holder.clear()
    return found


@functools.cache
def _uses_interface(kind: Any) -> bool:
    return "ALL_ATTENTION_FUNCTIONS" in names_in(kind.forward)
