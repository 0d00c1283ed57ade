"""Find the weights without effect once layers are dropped or reuse what a layer below computes.

They are found by gradients, not by names. A weight inside the attention modules of a layer that reuses is dead if it gets a
gradient in the original model and none in the changed model. If attention weights are reused, these are the query and key
projections, their norms and, in a fused projection, all rows but those of the values, in any order of the rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hpr.anatomy.describe import describe
from hpr.anatomy.lookup import module_at, weight_of
from hpr.anatomy.model import Anatomy
from hpr.errors import HprError
from hpr.layer_reuse.attention import Holder, role_of
from hpr.layer_reuse.install import attention_at, reading_the_same, with_states
from hpr.layer_reuse.reuse import DeadWeights, RowRanges
from hpr.plans.layer_states import DROPPED, paths_of, site_layer
from hpr.runtime.batch import Batch, BatchLike, example_batch
from hpr.runtime.hooks import run, to_device_of

TOLERANCE = 1e-3  # how far attention computed here may change an output, relative to its largest value


def dead_weights(model: nn.Module, states: Mapping[str, str], batch: BatchLike | None = None) -> DeadWeights:
    """The weights of a model without effect under some states of its layers (see ``install.with_states``).

    The gradients are those of a random projection of the output for one ``batch``, by default ``example_batch(model)``. Raises
    ``HprError`` for impossible states, and if attention computed by hpr differs from that of the model.
    """
    anatomy = describe(model)
    probe = reading_the_same(with_states(model, states), torch.float32)
    rows: dict[str, RowRanges] = {site.name: () for site in anatomy.sites if states.get(site_layer(site) or "") == DROPPED}
    removed = _beside_dropped(model, anatomy, states)
    taking = [path for path, state in paths_of(anatomy, states).items() if state != DROPPED]
    inside = _weighted_modules(probe, taking)
    if not inside:
        return DeadWeights(rows, removed)
    batch = example_batch(model) if batch is None else to_device_of(batch, model)
    original = reading_the_same(model, torch.float32)
    before, after = _effects(original, inside, batch), _effects(probe, inside, batch)
    _check_attention(original, anatomy, states, batch)
    sites = {site.name: site for site in anatomy.sites}
    for path in inside:
        gone = not any(effect.any() for effect in after[path].values())
        if not any(effect.any() for effect in before[path].values()):
            continue
        site = sites.get(path)
        if site is None:
            if gone:
                removed[path] = sum(parameter.numel() for parameter in module_at(model, path).parameters(recurse=False))
        elif not site.aliases and gone:
            rows[site.name] = ()
            if site.has_bias:
                removed[site.name] = site.out_features
        elif not site.aliases and site.kind == "linear":
            stays = ~before[path]["weight"] | after[path]["weight"]
            if not stays.all():
                rows[site.name] = tuple(_runs(stays))
    return DeadWeights(rows, removed)


def _weighted_modules(model: nn.Module, blocks: Sequence[str]) -> list[str]:
    """Paths of the modules inside the attention modules of some blocks that have parameters of their own."""
    found = []
    for block in blocks:
        for path, attention in attention_at(model, block).items():
            for inner, module in attention.named_modules():
                if inner and next(module.parameters(recurse=False), None) is not None:
                    found.append(f"{path}.{inner}")
    return found


def _beside_dropped(model: nn.Module, anatomy: Anatomy, states: Mapping[str, str]) -> dict[str, int]:
    """Layer → parameters of a dropped block besides the weights of its sites."""
    removed = {}
    for (name, state), path in zip(states.items(), paths_of(anatomy, states), strict=True):
        if state == DROPPED:
            total = sum(parameter.numel() for parameter in module_at(model, path).parameters())
            removed[name] = total - sum(site.parameters for site in anatomy.sites if site_layer(site) == name)
    return removed


def _effects(model: nn.Module, paths: Sequence[str], batch: Batch) -> dict[str, dict[str, Tensor]]:
    """Path → parameter → which of its rows get a gradient; the rows of a Conv1D are its outputs."""
    model.eval().requires_grad_(True)
    owners = [(path, name) for path in paths for name, _ in module_at(model, path).named_parameters(recurse=False)]
    parameters = [getattr(module_at(model, path), name) for path, name in owners]
    with torch.enable_grad():
        output = _output(run(model, _as_float(batch)))
        direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        gradients = torch.autograd.grad((output * direction).sum(), parameters, allow_unused=True)
    found: dict[str, dict[str, Tensor]] = {path: {} for path in paths}
    for (path, name), parameter, gradient in zip(owners, parameters, gradients, strict=True):
        module = module_at(model, path)
        touched = torch.zeros_like(parameter, dtype=torch.bool) if gradient is None else gradient != 0
        if name == "weight" and weight_of(module).shape != parameter.shape:
            touched = touched.T
        found[path][name] = touched.reshape(len(touched), -1).any(1).cpu()
    return found


def _check_attention(original: nn.Module, anatomy: Anatomy, states: Mapping[str, str], batch: Batch) -> None:
    """Raise ``HprError`` if attention computed by hpr changes the output: the model computes more than plain attention."""
    through = reading_the_same(original)
    for stack in anatomy.stacks:
        if any(name.rpartition(".")[0] == stack.name for name in states):
            for path in stack.blocks:
                for name, module in attention_at(through, path).items():
                    role_of(module, name).gives_weights = Holder()
    with torch.no_grad():
        expected, found = (_output(run(model.eval(), _as_float(batch))) for model in (original, through))
    error = (expected - found).abs().max()
    if not error <= TOLERANCE * expected.abs().max():
        raise HprError(
            f"attention of {anatomy.model_class} is more than softmax(Q Kᵀ) V with a mask (its output moved by "
            f"{float(error):.3g}): plan without attention reuse for this model"
        )


def _output(outputs: Any) -> Tensor:
    """The first floating-point tensor among the outputs of a model."""
    if isinstance(outputs, Tensor):
        return outputs
    for value in outputs.values() if isinstance(outputs, Mapping) else outputs:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise HprError(f"the outputs, a {type(outputs).__name__}, hold no tensor of floating-point numbers: give another batch")


def _as_float(batch: Batch) -> Batch:
    def widened(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) and value.is_floating_point() else value

    return {key: widened(value) for key, value in batch.items()}


def _runs(mask: Tensor) -> Iterator[tuple[int, int]]:
    """[start, stop) of each run of True."""
    start = None
    for place, stays in enumerate([*mask.tolist(), False]):
        if stays and start is None:
            start = place
        elif not stays and start is not None:
            yield start, place
            start = None
