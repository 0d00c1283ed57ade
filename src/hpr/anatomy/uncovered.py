"""Parameters of two or more dimensions that are no sites, so that no plan can change them, and why."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from hpr.anatomy.lookup import module_at, slice_at
from hpr.anatomy.model import Anatomy, Site

_PARTS = (
    ".parametrizations."  # torch stores the parts of a parametrised weight there, like the size and direction of a weight norm
)


@dataclass(frozen=True)
class Uncovered:
    """Parameters of one name in modules of one class: how many (``count``), their total size, and why they are no sites."""

    owner: str
    parameter: str
    count: int
    parameters: int
    reason: str


def uncovered(model: nn.Module, anatomy: Anatomy) -> list[Uncovered]:
    """All parameters of two or more dimensions that are no sites, each once, the largest first. Works on the meta device.

    They are part of ``anatomy.other_parameters``, which also counts biases and norms.
    """
    sites = {id(_parameter_of(model, site)) for site in anatomy.sites}
    found: dict[tuple[str, str, str], list[int]] = defaultdict(list)
    for path, parameter in model.named_parameters():
        if parameter.dim() > 1 and id(parameter) not in sites:
            owner, _, name = path.rpartition(".") if _PARTS not in path else path.partition(_PARTS)
            module = model.get_submodule(owner)
            found[type(module).__name__, name, _reason(module, name, parameter)].append(parameter.numel())
    rows = [Uncovered(owner, name, len(sizes), sum(sizes), reason) for (owner, name, reason), sizes in found.items()]
    return sorted(rows, key=lambda row: -row.parameters)


def _parameter_of(model: nn.Module, site: Site) -> Tensor:
    if site.expert is not None and (expert := slice_at(model, site.name)) is not None:
        return getattr(expert.module, expert.parameter)
    return module_at(model, site.name).weight  # type: ignore[return-value]


def _reason(owner: nn.Module, name: str, parameter: Tensor) -> str:
    if isinstance(owner, _ConvNd):
        return "a convolution"
    if isinstance(owner, nn.Linear | Conv1D) and name == "weight":
        return f"a {type(owner).__name__}, whose forward does more than multiply by its weight"
    if parameter.numel() == max(parameter.shape):
        return "a single vector, like a class token: it has no rank to lower"
    matrices = [side for side in parameter.shape if side > 1]
    if len(matrices) > 2 and getattr(owner, "is_transposed", False):
        return "experts that are stored transposed, as (in, out)"
    if len(matrices) > 2:
        return f"no matrix, nor experts that are read as F.linear(x, self.{name}[i])"
    return "read by its module itself, past any Linear or Embedding, like a router or a table of positions"
