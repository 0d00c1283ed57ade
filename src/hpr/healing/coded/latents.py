"""A float number behind every code, which training moves; the model computes with the rounded ones.

A latent counts in steps of its grid. The weight is row grid · round(latent) · column grid, and the gradient passes the rounding
as if it were not there (straight-through, Bengio et al. 2013). The model keeps its modules and parameters: rounded weights are
written into them, and their gradients are read from them. So tied modules, which hold one parameter, have one latent, and every
model that trains at all trains this way.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hpr.anatomy.lookup import module_at, weight_of
from hpr.coding.codes import Codes, Product, half_octaves, joined, part_names, parts_of
from hpr.rounding.matrices import NEAREST, Rule


@dataclass(eq=False)
class Latent:
    """The latents of one weight.

    ``value`` (out, in), float32, in steps of the grid: a parameter of the optimiser and not of the model. ``codes`` are those
    that it started from; their grids stay. ``module`` holds the weight.
    """

    module: nn.Module
    codes: Codes
    value: nn.Parameter
    rows: Float[Tensor, "out 1"] = field(init=False)
    columns: Float[Tensor, " in"] = field(init=False)

    def __post_init__(self) -> None:
        device = self.value.device
        rows = (self.codes.scale * half_octaves(self.codes.rows)).astype(np.float32)  # as Codes.weight computes them
        self.rows = torch.from_numpy(rows)[:, None].to(device)
        self.columns = torch.from_numpy(half_octaves(self.codes.columns).astype(np.float32)).to(device)

    @property
    def weight(self) -> nn.Parameter:
        """The parameter of the model that these latents stand for."""
        parameter: nn.Parameter = self.module.weight  # type: ignore[assignment]
        return parameter

    def rounded(self, rule: Rule = NEAREST) -> Float[Tensor, "out in"]:
        """The whole numbers for the latents."""
        return rule.whole(self.value.detach())

    def margins(self) -> Float[Tensor, " n"]:
        """How far the threshold of rounding can rise, at most to 1, before one code after the other gets smaller."""
        sizes = self.value.detach().abs().flatten()
        found = sizes + 0.5 - (sizes + 0.5).floor()
        return found[(sizes >= 0.5) & (found < 0.5)].add_(1e-6)

    def whole(self, rule: Rule = NEAREST) -> Codes:
        """The same as codes."""
        values = self.rounded(rule).cpu().numpy().astype(np.int32)
        return Codes(values, self.codes.rows, self.codes.columns, self.codes.scale)

    @torch.no_grad()
    def write(self, rule: Rule = NEAREST) -> None:
        """Put the rounded weight into the model: the bits that a decoder would compute."""
        weight_of(self.module).copy_(self.rounded(rule).mul_(self.rows).mul_(self.columns))

    def gradient(self) -> Float[Tensor, "out in"] | None:
        """The gradient of the loss in the latents, from that in the weight; None if the last batch did not read the weight."""
        found = self.weight.grad
        if found is None:
            return None
        found = found.T if isinstance(self.module, Conv1D) else found
        return found.float() * self.rows * self.columns


@dataclass(eq=False)
class FactorLatent(Latent):
    """The latents of one factor of a weight that is a product. ``partner``: those of the other factor, set afterwards."""

    is_left: bool = True
    partner: FactorLatent = field(init=False, repr=False)

    @torch.no_grad()
    def write(self, rule: Rule = NEAREST) -> None:
        """Put the product into the model, once for both factors."""
        if self.is_left:
            weight_of(self.module).copy_(Product(self.whole(rule), self.partner.whole(rule)).weight())

    def gradient(self) -> Float[Tensor, "out in"] | None:
        """The gradient of the loss in the latents of this factor, with the other one as it is rounded."""
        found = self.weight.grad
        if found is None:
            return None
        found = (found.T if isinstance(self.module, Conv1D) else found).float()
        other = self.partner.rounded() * self.partner.rows * self.partner.columns
        return (found @ other.T if self.is_left else other.T @ found) * self.rows * self.columns


class Latents:
    """The latents of a model, in the order of ``codes``: by site, or by factor for a weight that is a product (``part_names``).

    Weights that take no gradient have none, and keep their codes.

    >>> latents = Latents(student, {"encoder.layer.0.output.dense": codes})  # doctest: +SKIP
    >>> latents["encoder.layer.0.output.dense"].value.shape  # doctest: +SKIP
    torch.Size([384, 1536])
    """

    def __init__(self, student: nn.Module, codes: Mapping[str, Codes | Product]):
        self._kept = dict(codes)
        self._by_part: dict[str, Latent] = {}
        for site, one in codes.items():
            module = module_at(student, site)
            weight: nn.Parameter = module.weight  # type: ignore[assignment]
            if not weight.requires_grad:
                continue
            values = [nn.Parameter(torch.from_numpy(part.values).to(weight.device, torch.float32)) for part in parts_of(one)]
            if isinstance(one, Codes):
                self._by_part[site] = Latent(module, one, values[0])
                continue
            left, right = FactorLatent(module, one.u, values[0]), FactorLatent(module, one.v, values[1], is_left=False)
            left.partner, right.partner = right, left
            self._by_part |= dict(zip(part_names(site, one), (left, right), strict=True))

    def __iter__(self) -> Iterator[Latent]:
        return iter(self._by_part.values())

    def __len__(self) -> int:
        return len(self._by_part)

    def __contains__(self, part: str) -> bool:
        return part in self._by_part

    def items(self) -> Iterable[tuple[str, Latent]]:
        """The latents with the names of their parts."""
        return self._by_part.items()

    def __getitem__(self, part: str) -> Latent:
        return self._by_part[part]

    def whole(self, rule: Rule = NEAREST) -> dict[str, Codes | Product]:
        """Site → codes, also of weights without latents."""
        return {
            site: joined([self._by_part[name].whole(rule) if name in self else part for name, part in named(site, one)])
            for site, one in self._kept.items()
        }

    def write(self, rule: Rule = NEAREST) -> None:
        """Put all rounded weights into the model."""
        for latent in self:
            latent.write(rule)


def named(site: str, codes: Codes | Product) -> list[tuple[str, Codes]]:
    """The parts of a weight with their names."""
    return list(zip(part_names(site, codes), parts_of(codes), strict=True))
