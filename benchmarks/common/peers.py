"""Published methods without training, in their plain form, for comparison at equal parameters on the same statistics.

Each takes a model, the sites to change, the profile and ``budget`` (kept share of those sites' weights), and returns a copy
with dense replaced weights and the number of parameters that its factors have. They are our own short forms: uniform ranks as
published, rounded up, so that none has less than its budget; no refinements.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hpr.anatomy.lookup import module_at
from hpr.anatomy.model import Site
from hpr.operators.low_rank import truncate
from hpr.operators.metric import Measured, Side
from hpr.operators.shared_basis import best_private, pooled_basis
from hpr.profiling.profile import Profile


def svd(model: nn.Module, sites: Sequence[Site], profile: Profile, budget: float) -> tuple[nn.Module, int]:
    """Truncated SVD of the plain weight, uniform rank."""
    return _private(model, sites, profile, budget, whitened=False)


def svd_llm(model: nn.Module, sites: Sequence[Site], profile: Profile, budget: float) -> tuple[nn.Module, int]:
    """Truncated SVD whitened by the input moment, uniform rank (SVD-LLM, Wang et al. 2024)."""
    return _private(model, sites, profile, budget, whitened=True)


def basis_sharing(model: nn.Module, sites: Sequence[Site], profile: Profile, budget: float) -> tuple[nn.Module, int]:
    """Input basis shared by pairs of adjacent layers, pooled whitening, uniform rank (Basis Sharing, Wang et al. 2025)."""
    student, parameters = copy.deepcopy(model), 0
    rows: dict[str, list[Site]] = {}
    for site in sites:
        rows.setdefault(site.slot, []).append(site)
    for row in rows.values():
        for start in range(0, len(row), 2):
            group = [_plain(model, site, profile, whitened=True) for site in row[start : start + 2]]
            out, into = group[0].weight.shape
            rank = min(math.ceil(budget * len(group) * out * into / (into + len(group) * out)), len(group) * out, into)
            parameters += rank * (into + len(group) * out)
            basis = pooled_basis(group, rank)
            for one in group:
                _set(student, one.site, best_private(one, basis) @ basis)
    return student, parameters


def drop_layers(model: nn.Module, layers: Sequence[int], path: str) -> nn.Module:
    """The model without some layers of its one stack (ShortGPT, Men et al. 2024)."""
    student = copy.deepcopy(model)
    blocks = module_at(student, path)
    assert isinstance(blocks, nn.ModuleList)
    for layer in sorted(layers, reverse=True):
        del blocks[layer]
    for place, block in enumerate(blocks):
        for module in block.modules():
            if hasattr(module, "layer_idx"):  # where a decoder's attention keeps its keys and values
                module.layer_idx = place
    if hasattr(student, "config"):
        student.config.num_hidden_layers = len(blocks)
    return student


def _private(model: nn.Module, sites: Sequence[Site], profile: Profile, budget: float, whitened: bool) -> tuple[nn.Module, int]:
    student, parameters = copy.deepcopy(model), 0
    for site in sites:
        one = _plain(model, site, profile, whitened)
        out, into = one.weight.shape
        rank = math.ceil(budget * out * into / (out + into))
        parameters += rank * (out + into)
        u, v = truncate(one, rank)
        _set(student, site, u @ v)
    return student, parameters


def _plain(model: nn.Module, site: Site, profile: Profile, whitened: bool) -> Measured:
    weight = module_at(model, site.name).weight.detach().double()  # type: ignore[union-attr, operator]
    ones = Side(torch.ones(len(weight)).double())
    known = profile.sites[site.name]
    right = known.right
    if known.mean is not None:
        right = right + torch.outer(known.mean, known.mean)  # these methods do not centre
    return Measured(site, weight, ones, Side(right) if whitened else Side(torch.ones(weight.shape[1]).double()), 1.0)


def _set(student: nn.Module, site: Site, weight: Tensor) -> None:
    with torch.no_grad():
        module_at(student, site.name).weight.copy_(weight)  # type: ignore[union-attr, operator]
