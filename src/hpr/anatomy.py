"""What is in a Transformer, found by structure: stacks of repeated blocks, their layers, slots and sites.

A *site* is one weight matrix W of shape (out, in), named ``stack.layer.slot`` (``encoder.3.intermediate.dense``). No table
of architectures is consulted: a stack is a numbered container whose children repeat the same weight matrices, and a slot
is a weight's path inside its block. An embedding table of V rows is a site of shape (V, d), just as the
output head that is often tied to it. The experts of a mixture are often slices of one three-dimensional parameter: each is a
site, named ``stack.layer.slot.expert``.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hpr.errors import HprError
from hpr.slices import Slice, slice_below, sliced_parameters

Kind = Literal["linear", "embedding"]


@dataclass(frozen=True)
class Site:
    """One weight matrix of the model.

    ``path`` is the module's path below the base model, or below the whole model for what hangs outside the base (a task
    head); ``module_at`` resolves both. ``aliases`` are the paths of further modules that read the same parameter (tied
    weights, counted once). ``stack`` and ``layer`` are None outside the stacks. ``expert`` is the number of a slice of a
    three-dimensional parameter, whose path then ends in the parameter's name and that number; None for modules.
    """

    name: str
    path: str
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
    def parameters(self) -> int:
        """Weight parameters, bias not counted (biases stay private)."""
        return self.out_features * self.in_features

    @property
    def position(self) -> int | None:
        """Where it stands in its row of neighbours: the expert among those of a layer, else the layer in its stack."""
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
        """Paths of the blocks of all layers, the lowest first."""
        return tuple(self.block(layer) for layer in range(self.layers))


@dataclass(frozen=True)
class Anatomy:
    """Stacks, sites and parameter counts of a model. ``other_parameters``: biases, norms and all that is no site."""

    model_class: str
    stacks: tuple[Stack, ...]
    sites: tuple[Site, ...]
    total_parameters: int
    fingerprint: str

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
        for site in self.sites:
            if site.name == name:
                return site
        raise HprError(f"no site named {name!r} in {self.model_class}; its sites are listed by `hpr inspect`")

    def select(self, pattern: str | None) -> tuple[Site, ...]:
        """Sites whose name matches a shell pattern (``encoder.*``); several patterns are separated by commas."""
        if pattern is None:
            return self.sites
        patterns = [part.strip() for part in pattern.split(",")]
        chosen = tuple(site for site in self.sites if any(fnmatchcase(site.name, part) for part in patterns))
        if not chosen:
            examples = ", ".join(site.name for site in self.sites[:3])
            raise HprError(f"only={pattern!r} matches no site of {self.model_class}; site names look like {examples}")
        return chosen

    def slots(self) -> dict[tuple[str, str], tuple[Site, ...]]:
        """(stack, slot) → its sites in layer order, split where shapes differ; sites outside the stacks stand alone.

        The experts of all layers are one slot, those of a layer one after the other.
        """
        found: dict[tuple[str, str, int, int], list[Site]] = defaultdict(list)
        for site in self.sites:
            found[site.stack or "", site.slot, site.out_features, site.in_features].append(site)
        rows: dict[tuple[str, str], tuple[Site, ...]] = {}
        for (stack, slot, out_features, in_features), sites in found.items():
            key = (stack, slot) if (stack, slot) not in rows else (stack, f"{slot} {out_features}x{in_features}")
            rows[key] = tuple(sites)
        return rows


def describe(model: nn.Module) -> Anatomy:
    """Find stacks, layers, slots and sites of any module by structure. Works on the meta device.

    Raises ``HprError`` where the model has no weight matrix at all.
    """
    modules = _modules_by_path(model)
    stacks = tuple(_stacks(modules))
    sites = tuple(_sites(modules, stacks))
    if not sites:
        raise HprError(f"{type(model).__name__} has no Linear or Embedding weight: there is nothing to share")
    total = sum(parameter.numel() for parameter in model.parameters())  # parameters() yields a tied one once
    return Anatomy(type(model).__name__, stacks, sites, total, _fingerprint(model, sites))


def base_of(model: nn.Module) -> tuple[nn.Module, str]:
    """The base model below a task head and its prefix (``bert.``); the model itself with '' where there is none."""
    prefix = getattr(model, "base_model_prefix", "")
    base = getattr(model, prefix, None) if prefix else None
    return (base, f"{prefix}.") if isinstance(base, nn.Module) else (model, "")


def module_at(model: nn.Module, path: str) -> nn.Module:
    """The module at a site's path: below the base model first, else below the whole model. Raises ``HprError``."""
    base, _ = base_of(model)
    for root in (base, model):
        try:
            return root.get_submodule(path)
        except AttributeError:
            continue
    raise HprError(f"{type(model).__name__} has no module {path!r}: the plan or checkpoint is of another model")


def has_module(model: nn.Module, path: str) -> bool:
    """Whether ``module_at`` finds one there."""
    try:
        module_at(model, path)
    except HprError:
        return False
    return True


def weight_of(module: nn.Module) -> torch.Tensor:
    """A site's weight as (out, in), whatever the module's own layout; a view, never a copy."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    return weight.T if isinstance(module, Conv1D) else weight


def weight_at(model: nn.Module, site: Site) -> torch.Tensor:
    """A site's weight as (out, in), a view of the parameter. Raises ``HprError`` where the model has no such site."""
    if site.expert is None:
        return weight_of(module_at(model, site.path))
    found = slice_at(model, site.path)
    if found is None:
        raise HprError(f"{type(model).__name__} has no experts at {site.path!r}: the plan or checkpoint is of another model")
    return found.weight


def slice_at(model: nn.Module, path: str) -> Slice | None:
    """The expert at a site's path, below the base model first; None where the path is not one of an expert."""
    return slice_below(base_of(model)[0], path) or slice_below(model, path)


def _modules_by_path(model: nn.Module) -> dict[str, nn.Module]:
    base, prefix = base_of(model)
    modules = dict(base.named_modules(remove_duplicate=False))
    for path, module in model.named_modules(remove_duplicate=False):
        if module is not base and not path.startswith(prefix or " "):
            modules.setdefault(path, module)
    return modules


def _stacks(modules: dict[str, nn.Module]) -> Iterator[Stack]:
    found: list[tuple[str, int]] = []
    for path, module in modules.items():
        if any(path.startswith(f"{outer}.") for outer, _ in found):
            continue  # experts and the like inside a block are slots of that block
        blocks = [child for name, child in module.named_children() if name.isdigit()]
        if len(blocks) < (1 if isinstance(module, nn.ModuleList) else 2):
            continue
        shapes = [_weight_shapes(block) for block in blocks]
        if shapes[0] and set.intersection(*shapes):
            found.append((path, len(blocks)))
    short_names = [path.rpartition(".")[0] or path for path, _ in found]
    for (path, layers), short in zip(found, short_names, strict=True):
        yield Stack(short if short_names.count(short) == 1 else path, path, layers)


def _weight_shapes(block: nn.Module) -> set[tuple[str, torch.Size]]:
    """Names and shapes of a block's matrices; empty for a bare Linear, which is a site and no block."""
    return {(name, parameter.shape) for name, parameter in block.named_parameters() if parameter.dim() == 2 and "." in name}


def _sites(modules: dict[str, nn.Module], stacks: tuple[Stack, ...]) -> Iterator[Site]:
    paths_of: dict[int, list[str]] = defaultdict(list)
    for path, module in modules.items():
        if isinstance(module, nn.Linear | nn.Embedding | Conv1D) and module.weight.dim() == 2:
            paths_of[id(module.weight)].append(path)
    for paths in paths_of.values():
        path, module = paths[0], modules[paths[0]]
        out_features, in_features = weight_of(module).shape
        stack, layer, slot = _place(path, stacks)
        yield Site(
            name=path if stack is None else f"{stack.name}.{layer}.{slot}",
            path=path,
            kind="embedding" if isinstance(module, nn.Embedding) else "linear",
            out_features=out_features,
            in_features=in_features,
            has_bias=getattr(module, "bias", None) is not None,
            stack=stack.name if stack else None,
            layer=layer,
            slot=slot,
            aliases=tuple(paths[1:]),
        )
    yield from _experts(modules, stacks)


def _experts(modules: dict[str, nn.Module], stacks: tuple[Stack, ...]) -> Iterator[Site]:
    paths_of: dict[int, dict[str, nn.Module]] = defaultdict(dict)
    for path, module in modules.items():
        for name, parameter in sliced_parameters(module):
            if module not in paths_of[id(parameter)].values():
                paths_of[id(parameter)][f"{path}.{name}" if path else name] = module
    for owners in paths_of.values():
        path, *others = owners
        stack, layer, slot = _place(path, stacks)
        name = path if stack is None else f"{stack.name}.{layer}.{slot}"
        count, out_features, in_features = getattr(owners[path], path.rpartition(".")[2]).shape
        for number in range(count):
            yield Site(
                name=f"{name}.{number}",
                path=f"{path}.{number}",
                kind="linear",
                out_features=out_features,
                in_features=in_features,
                has_bias=False,
                stack=stack.name if stack else None,
                layer=layer,
                slot=slot,
                aliases=tuple(f"{other}.{number}" for other in others),
                expert=number,
            )


def _place(path: str, stacks: tuple[Stack, ...]) -> tuple[Stack | None, int | None, str]:
    for stack in stacks:
        if path.startswith(f"{stack.path}." if stack.path else ""):
            number, _, slot = path.removeprefix(f"{stack.path}." if stack.path else "").partition(".")
            if number.isdigit() and slot:
                return stack, int(number), slot
    return None, None, path


def _fingerprint(model: nn.Module, sites: tuple[Site, ...]) -> str:
    """A hash of names, shapes and a sample of values, so that a profile or plan of another model is noticed."""
    digest = hashlib.sha256()
    for site in sites:
        weight = weight_at(model, site)
        digest.update(f"{site.name}:{tuple(weight.shape)};".encode())
        if not weight.is_meta:
            sample = weight.detach()[:: max(1, weight.shape[0] // 8), :: max(1, weight.shape[1] // 8)]
            digest.update(sample.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
