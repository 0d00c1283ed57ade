"""What is in a Transformer, found by structure: stacks of repeated blocks, their layers, slots and sites.

A *site* is one weight matrix W of shape (out, in). Its name is the path of its module (``encoder.layer.3.intermediate.dense``).
No table of architectures is used: a stack is a numbered container whose children repeat the same weight matrices, and a slot
is the path of a weight inside its block. An embedding table of V rows is a site of shape (V, d), and so is the output head that
is often tied to it. The experts of a mixture are often slices of one three-dimensional parameter. Each expert is a site: its
name is the path of the parameter and its number.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hpr.anatomy.fused_experts import sliced_parameters
from hpr.anatomy.lookup import base_of, weight_at, weight_of
from hpr.anatomy.model import Anatomy, Site, Stack
from hpr.anatomy.multiplies import multiplies
from hpr.errors import HprError


def describe(model: nn.Module) -> Anatomy:
    """The stacks, layers, slots and sites of any module, found by structure. Works on the meta device.

    The values of the weights are read only if the fingerprint is asked for, once, as they are at that moment. Raises
    ``HprError`` if the model has no weight matrix.

    >>> anatomy = describe(AutoModel.from_pretrained("bert-base-uncased"))
    >>> anatomy.stacks
    (Stack(name='encoder', path='encoder.layer', layers=12),)
    >>> anatomy["encoder.layer.3.output.dense"].label
    'encoder.3.output.dense'
    """
    modules = _modules_by_path(model)
    stacks = tuple(_stacks(modules))
    sites = tuple(_sites(modules, stacks))
    if not sites:
        raise HprError(f"{type(model).__name__} has no Linear or Embedding weight: there is nothing to share")
    total = sum(parameter.numel() for parameter in model.parameters())  # parameters() yields a tied one once
    weights = [weight_at(model, site).detach() for site in sites]
    return Anatomy(type(model).__name__, stacks, sites, total, lambda: _fingerprint(sites, weights))


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
        if _has_weight(module) and (isinstance(module, nn.Embedding) or _is_product(module)):
            paths_of[id(module.weight)].append(path)
    for paths in paths_of.values():
        path, module = paths[0], modules[paths[0]]
        out_features, in_features = weight_of(module).shape
        stack, layer, slot = _place(path, stacks)
        yield Site(
            name=path,
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


def _has_weight(module: nn.Module) -> bool:
    """Whether a module is of a kind that sites have, with a matrix of its own that is not computed from other parameters."""
    if not isinstance(module, nn.Linear | nn.Embedding | Conv1D):
        return False
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and weight.numel() > 0  # MobileBERT's head may have no column


def _is_product(module: nn.Module) -> bool:
    """Whether a module multiplies by its weight, or says itself that its weight is a matrix to work on."""
    return getattr(module, "is_site", False) is True or multiplies(module)


def _experts(modules: dict[str, nn.Module], stacks: tuple[Stack, ...]) -> Iterator[Site]:
    paths_of: dict[int, dict[str, nn.Module]] = defaultdict(dict)
    for path, module in modules.items():
        for name, parameter in sliced_parameters(module):
            if module not in paths_of[id(parameter)].values():
                paths_of[id(parameter)][f"{path}.{name}" if path else name] = module
    for owners in paths_of.values():
        path, *others = owners
        stack, layer, slot = _place(path, stacks)
        count, out_features, in_features = getattr(owners[path], path.rpartition(".")[2]).shape
        for number in range(count):
            yield Site(
                name=f"{path}.{number}",
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


def _fingerprint(sites: tuple[Site, ...], weights: list[Tensor]) -> str:
    """A hash of names, shapes and a sample of values, so that a profile or plan of another model is noticed."""
    digest = hashlib.sha256()
    for site, weight in zip(sites, weights, strict=True):
        digest.update(f"{site.name}:{tuple(weight.shape)};".encode())
        if not weight.is_meta:
            sample = weight[:: max(1, weight.shape[0] // 8), :: max(1, weight.shape[1] // 8)]
            digest.update(sample.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
