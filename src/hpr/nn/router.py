"""Routers, which make the weight of a term depend on the input. Experimental.

α(x) = experts · softmax(R [x; 1]). A router per token sees the input of one position, so later positions have no influence
and nothing has to be cached. A router per sequence sees the mean over the positions that are not masked; the mask is that of
the call of the nearest module around the site.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from hpr.anatomy.lookup import module_at
from hpr.plans.product import fixed_weights
from hpr.plans.terms import Route

_MASK = "attention_mask"
Taken = dict[tuple[str, str], list[tuple[Tensor, Tensor | None]]]  # see ``Routing.taken``


class _Pass:
    """What belongs to the passes of one thread."""

    def __init__(self) -> None:
        self.masks: list[Tensor | None] = []
        self.taken: Taken | None = None


class Routing:
    """The masks of the current calls, the innermost last; and the outputs of routers while ``taken`` is a dict.

    Each thread has its own, so that one model serves several. ``taken``: (site's path, router) → for each call α (…, experts)
    and which positions count (…), None if all do.
    """

    def __init__(self) -> None:
        self._compiled = _Pass()
        self._threads = threading.local()

    def _pass(self) -> _Pass:
        if torch.compiler.is_compiling():  # it traces in one thread, and cannot follow what belongs to a thread
            return self._compiled
        if not hasattr(self._threads, "passes"):
            self._threads.passes = _Pass()
        return self._threads.passes  # type: ignore[no-any-return]

    @property
    def masks(self) -> list[Tensor | None]:
        return self._pass().masks

    @property
    def taken(self) -> Taken | None:
        return self._pass().taken

    @taken.setter
    def taken(self, taken: Taken | None) -> None:
        self._pass().taken = taken

    def __deepcopy__(self, memo: Any) -> Routing:
        return Routing()  # what belongs to a pass belongs to no copy

    def __reduce__(self) -> tuple[type[Routing], tuple[()]]:
        return Routing, ()

    def __call__(
        self, route: Route, router: Float[Tensor, "experts columns"], x: Float[Tensor, "*batch in"], path: str
    ) -> Float[Tensor, "*batch_of_alpha experts"]:
        """α for an input x. Its batch is that of x per token, (batch, 1, …) per sequence, and empty for a fixed route."""
        if route.per == "fixed":
            return fixed_weights(route, router)
        mask = self.masks[-1] if self.masks and x.dim() > 2 else None
        counted = mask if mask is not None and mask.shape == x.shape[:-1] else None
        if route.per == "sequence" and x.dim() > 2:
            x, counted = _mean(x, counted), None
        weights = route.experts * F.linear(x, router[:, :-1], router[:, -1]).softmax(-1)
        if self.taken is not None:
            self.taken.setdefault((path, route.router), []).append((weights, counted))
        return weights


def spread(shares: Float[Tensor, "*batch experts"]) -> Float[Tensor, "*batch"]:
    """Entropy of the experts' shares, which add up to 1, divided by the entropy of even shares."""
    return torch.special.entr(shares).sum(-1) / math.log(shares.shape[-1])


@contextmanager
def recorded(routing: Routing) -> Iterator[Taken]:
    """Collect what routers return in the passes inside the ``with`` block (see ``Routing.taken``)."""
    before, routing.taken = routing.taken, {}
    try:
        yield routing.taken
    finally:
        routing.taken = before


def note_masks(model: nn.Module, routing: Routing, paths: Iterable[str]) -> None:
    """Hook the modules around some sites, so that the routing knows the mask of their calls. In place."""
    sites = {module_at(model, path) for path in paths}
    for module in model.modules():
        if not sites.isdisjoint(module.modules()) and _MASK in (names := list(inspect.signature(module.forward).parameters)):
            module.register_forward_pre_hook(_Enter(routing, names.index(_MASK)), with_kwargs=True)
            module.register_forward_hook(_Leave(routing), always_call=True)


def forget_masks(model: nn.Module) -> None:
    """Remove the hooks of ``note_masks``, in place."""
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for number in [number for number, hook in hooks.items() if isinstance(hook, _Enter | _Leave)]:
                del hooks[number]
                module._forward_pre_hooks_with_kwargs.pop(number, None)
                module._forward_hooks_always_called.pop(number, None)


class _Enter:
    """A hook as an object, so that a copy of the model gets a copy of it."""

    def __init__(self, routing: Routing, place: int):
        self.routing, self.place = routing, place

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        around = self.routing.masks[-1] if self.routing.masks else None
        given = args[self.place] if len(args) > self.place else kwargs.get(_MASK, around)
        if isinstance(given, Tensor) and given.dim() > 2:  # made for attention alone, from the mask around
            given = _positions(given) if around is None else around
        self.routing.masks.append(given)


class _Leave:
    def __init__(self, routing: Routing):
        self.routing = routing

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.routing.masks:
            self.routing.masks.pop()


def _positions(attention: Tensor) -> Tensor | None:
    """The positions (batch, keys) that any query may see, from an attention mask (batch, heads, queries, keys).

    A caller of ``model.forward`` passes the model's hooks by, as sentence-transformers does, so this mask is all that is seen.
    """
    if attention.dim() != 4 or not (attention.dtype == torch.bool or attention.is_floating_point()):
        return None
    seen = attention if attention.dtype == torch.bool else attention > torch.finfo(attention.dtype).min / 2
    return seen.any(1).any(1)


def _mean(x: Tensor, mask: Tensor | None) -> Tensor:
    """(batch, …, in) → (batch, 1, …, in): the mean over positions that count."""
    between = tuple(range(1, x.dim() - 1))
    if mask is None:
        return x.mean(between, keepdim=True)
    kept = mask.to(x.dtype).unsqueeze(-1)
    return (x * kept).sum(between, keepdim=True) / kept.sum(between, keepdim=True).clamp(min=1)
