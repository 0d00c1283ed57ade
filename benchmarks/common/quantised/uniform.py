"""Fixed widths in groups of 64 numbers of a row: round to nearest, and GPTQ (Frantar et al., 2022, arXiv 2210.17323).

Each group has a scale and an offset of 16 bits. GPTQ rounds the columns of a weight (out, in) from the first to the last; the
columns that follow take up the error, as the moment of the inputs says. Our own short form of the published method: no order
by activation, damping 1 % of the mean moment, the grid of a group is laid when the group is reached.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from common.quantised.packing import ans_bytes, zstd_bytes
from common.quantised.student import Peer, half_bytes, weights_of, with_weights
from hpr.anatomy.describe import describe
from hpr.anatomy.lookup import module_at
from hpr.profiling.profile import Profile
from hpr.runtime.batch import as_batches
from hpr.runtime.hooks import eval_mode, run

GROUP = 64
DAMPING = 0.01
Moments = Mapping[str, Float[Tensor, "in in"]]  # by site
Grid = tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]


@dataclass(frozen=True)
class Grouped:
    """weight[i, j] = codes[i, j] · step[i, j // 64] + low[i, j // 64]; ``codes``: (out, in), from 0 to 2^bits − 1."""

    codes: Int[Tensor, "out in"]
    low: Float[Tensor, "out groups"]
    step: Float[Tensor, "out groups"]

    def weight(self) -> Float[Tensor, "out in"]:
        """The numbers that the codes stand for."""
        width = self.codes.shape[1]
        low, step = (part.repeat_interleave(GROUP, 1)[:, :width] for part in (self.low, self.step))
        return self.codes * step + low


def nearest(weight: Float[Tensor, "out in"], bits: int) -> Grouped:
    """Every number rounded to the nearest of 2^bits values between the smallest and the largest of its group."""
    grids = [_grid(part, bits) for part in weight.split(GROUP, 1)]
    codes = [_codes(part, low, step, bits) for part, (low, step) in zip(weight.split(GROUP, 1), grids, strict=True)]
    return Grouped(torch.cat(codes, 1).to(torch.uint8), *(torch.cat(side, 1) for side in zip(*grids, strict=True)))


def gptq(weight: Float[Tensor, "out in"], moment: Float[Tensor, "in in"], bits: int, given: Grid | None = None) -> Grouped:
    """A weight rounded column by column against the moment of its inputs; ``given``: offsets and steps to use, if known."""
    rest, width = weight.double().clone(), weight.shape[1]
    damped = moment.double() + torch.eye(width).double() * max(DAMPING * float(moment.diagonal().mean()), 1e-30)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    root = torch.linalg.cholesky(inverse, upper=True)
    codes, grids = torch.empty(weight.shape, dtype=torch.uint8), []
    for number, start in enumerate(range(0, width, GROUP)):
        stop = min(start + GROUP, width)
        block = rest[:, start:stop]
        low, step = _grid(block, bits) if given is None else (side[:, number, None].double() for side in given)
        grids.append((low, step))
        errors = torch.empty_like(block)
        for j in range(stop - start):
            code = _codes(block[:, j, None], low, step, bits)
            codes[:, start + j] = code[:, 0].to(torch.uint8)
            errors[:, j] = (block[:, j] - (code * step + low)[:, 0]) / root[start + j, start + j]
            block[:, j:] -= errors[:, j, None] * root[start + j, start + j : stop]
        rest[:, stop:] -= errors @ root[start:stop, stop:]
    return Grouped(codes, *(torch.cat(side, 1) for side in zip(*grids, strict=True)))


def uniform(model: nn.Module, bits: int, moments: Moments | None = None) -> Peer:
    """A model at a fixed width: by GPTQ where a moment is given for a site, else to nearest."""
    found: dict[str, Grouped] = {}
    for name, weight in weights_of(model).items():
        moment = (moments or {}).get(name)
        found[name] = nearest(weight, bits) if moment is None else gptq(weight, moment, bits)
    scales = sum(4 * grouped.low.numel() for grouped in found.values())
    beside = scales + half_bytes(model, found)
    codes = [grouped.codes.numpy() for grouped in found.values()]
    sizes = {
        "fixed": beside + sum(-(-one.size * bits // 8) for one in codes),
        "ANS": beside + sum(ans_bytes(one) for one in codes),
        "zstd": beside + sum(zstd_bytes(one, bits) for one in codes),
    }
    return Peer(with_weights(model, {name: grouped.weight() for name, grouped in found.items()}), sizes)


def input_moments(model: nn.Module, batches: Sequence[Any]) -> Moments:
    """E[x xᵀ] of the inputs of every linear site, not centred, padding left out: what GPTQ calls the Hessian."""
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    mask: Tensor | None = None

    def record(name: str, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0].double()
        x = x[mask.bool()] if mask is not None and x.shape[:-1] == mask.shape else x.flatten(0, -2)
        sums[name] = sums.get(name, 0) + x.T @ x
        rows[name] = rows.get(name, 0) + len(x)

    sites = [site.name for site in describe(model).sites if site.kind == "linear"]
    hooks = [
        module_at(model, name).register_forward_pre_hook(lambda _, inputs, name=name: record(name, inputs)) for name in sites
    ]
    try:
        with torch.no_grad(), eval_mode(model):
            for batch in as_batches(batches):
                mask = batch.get("attention_mask")
                run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / rows[name] for name, total in sums.items()}


def table_moments(profile: Profile) -> Moments:
    """The moments of the gradients of tables. Tables have no inputs but tokens, so the published method does not round them."""
    return {name: site.right for name, site in profile.sites.items() if site.left.dim() == 1 and site.right.dim() == 2}


def _grid(part: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Offset and step (out, 1) of a group, from its smallest and largest numbers as 16 bits hold them."""
    low, high = (edge.half().to(part) for edge in (part.amin(1, keepdim=True), part.amax(1, keepdim=True)))
    return low, ((high - low) / (2**bits - 1)).clamp(min=1e-12)


def _codes(part: Tensor, low: Tensor, step: Tensor, bits: int) -> Tensor:
    return ((part - low) / step).round().clamp(0, 2**bits - 1)
