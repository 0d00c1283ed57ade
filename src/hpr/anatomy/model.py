"""The description of a model: its stacks, layers and sites.

A *site* is one weight matrix W of shape (out, in). Its name is the path of its module (``encoder.layer.3.intermediate.dense``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Literal

from hpr.errors import HprError

Kind = Literal["linear", "embedding"]


@dataclass(frozen=True)
class Site:
    """One weight matrix of the model.

    ``name`` is the path of the module below the base model, or below the whole model for a module outside the base (a task
    head). It is the key of the site in profiles, plans and checkpoints; ``module_at`` and ``weight_at`` resolve it.
    ``aliases`` are the paths of further modules that read the same parameter (tied weights, counted once). ``stack`` and
    ``layer`` are None outside the stacks. ``expert`` is the number of a slice of a three-dimensional parameter, and the name
    then ends in the name of the parameter and that number; it is None for modules.

    >>> site = Site("encoder.layer.3.output.dense", "linear", 768, 3072, True, "encoder", 3, "output.dense")
    >>> site.label, site.parameters
    ('encoder.3.output.dense', 2359296)
    """

    name: str
    kind: Kind
    out_features: int
    in_features: int
    has_bias: bool
    stack: str | None = None
    layer: int | None = None
    slot: str = ""
    aliases: tuple[str, ...] = ()
    expert: int | None = None

    @property
    def label(self) -> str:
        """Short text for people: ``stack.layer.slot`` (``encoder.3.output.dense``); the name outside the stacks."""
        if self.layer is None:
            return self.name
        expert = () if self.expert is None else (str(self.expert),)
        return ".".join([*([self.stack] if self.stack else []), str(self.layer), self.slot, *expert])

    @property
    def parameters(self) -> int:
        """Weight parameters, bias not counted (biases stay private)."""
        return self.out_features * self.in_features

    @property
    def position(self) -> int | None:
        """Its number among its neighbours: the number of the expert in its layer, or of the layer in its stack."""
        return self.layer if self.expert is None else self.expert


@dataclass(frozen=True)
class Stack:
    """A sequence of repeated blocks: ``path`` of the container below the base model, and its number of layers."""

    name: str
    path: str
    layers: int

    def block(self, layer: int | str) -> str:
        """Path of a layer's block below the base model."""
        return f"{self.path}.{layer}" if self.path else str(layer)

    @property
    def blocks(self) -> tuple[str, ...]:
        """Paths of the blocks of all layers, lowest first."""
        return tuple(self.block(layer) for layer in range(self.layers))


@dataclass(frozen=True)
class Anatomy:
    """Stacks, sites and parameter counts of a model. ``other_parameters``: biases, norms and everything that is no site.

    ``read_fingerprint`` computes the fingerprint from the weights; two descriptions are equal without it.

    >>> anatomy = describe(model)
    >>> anatomy["encoder.layer.3.output.dense"].parameters
    2359296
    >>> [site.label for site in anatomy.select("encoder.3.output.*")]
    ['encoder.3.output.dense']
    """

    model_class: str
    stacks: tuple[Stack, ...]
    sites: tuple[Site, ...]
    total_parameters: int
    read_fingerprint: Callable[[], str] = field(compare=False, repr=False)

    @cached_property
    def fingerprint(self) -> str:
        """A hash of names, shapes and a sample of the weights as they are when this is first asked for."""
        return self.read_fingerprint()

    @property
    def site_parameters(self) -> int:
        return sum(site.parameters for site in self.sites)

    @property
    def other_parameters(self) -> int:
        return self.total_parameters - self.site_parameters

    @property
    def blocks(self) -> tuple[str, ...]:
        """Paths of the blocks of all stacks, below the base model."""
        return tuple(path for stack in self.stacks for path in stack.blocks)

    def __getitem__(self, name: str) -> Site:
        if (site := self._by_name.get(name)) is not None:
            return site
        raise HprError(f"no site named {name!r} in {self.model_class}; its sites are listed by `hpr inspect`")

    @cached_property
    def _by_name(self) -> dict[str, Site]:
        return {site.name: site for site in self.sites}

    def select(self, pattern: str | None) -> tuple[Site, ...]:
        """Sites whose name or label matches a shell pattern (``encoder.3.*``). Commas separate several patterns.

        Returns all sites for None. Raises ``HprError`` if no site matches.
        """
        if pattern is None:
            return self.sites
        patterns = [part.strip() for part in pattern.split(",")]
        chosen = tuple(site for site in self.sites if any(_matches(site, part) for part in patterns))
        if not chosen:
            example = next((site for site in self.sites if site.stack is not None), self.sites[0])
            raise HprError(
                f"only={pattern!r} matches no site of {self.model_class}: give a pattern for a label, like {example.label}, "
                f"or for a site key (the path below the base model), like {example.name}"
            )
        return chosen

    def slots(self) -> dict[tuple[str, str], tuple[Site, ...]]:
        """(stack, slot) → its sites in layer order, split if shapes differ. A site outside the stacks is a slot by itself.

        The experts of all layers are one slot, sorted by layer.
        """
        found: dict[tuple[str, str, int, int], list[Site]] = defaultdict(list)
        for site in self.sites:
            found[site.stack or "", site.slot, site.out_features, site.in_features].append(site)
        rows: dict[tuple[str, str], tuple[Site, ...]] = {}
        for (stack, slot, out_features, in_features), sites in found.items():
            key = (stack, slot) if (stack, slot) not in rows else (stack, f"{slot} {out_features}x{in_features}")
            rows[key] = tuple(sites)
        return rows


def _matches(site: Site, pattern: str) -> bool:
    return fnmatchcase(site.name, pattern) or fnmatchcase(site.label, pattern)
