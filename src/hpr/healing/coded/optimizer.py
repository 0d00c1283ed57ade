"""AdamW for floats and latents at once; the price of the latents holds the file at its bytes."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hpr.healing.coded.budget import ByteBudget
from hpr.healing.coded.latents import Latent, Latents
from hpr.healing.coded.rate import prices

_log = logging.getLogger(__name__)
_EVERY = 10  # steps between two looks at the bytes
_AIM = 0.998  # of the limit
_GAIN, _BRAKE, _MOST = 4.0, 12.0, 0.5  # how the price of a bit follows the share of bytes too many, and its growth
_BETAS = (0.9, 0.999)
_TINY = 1e-16


class Pressure:
    """Holds the bytes of a file at its budget: the price of a bit rises while they are more, and falls while they are fewer.

    ``price``: in units of the loss per bit; 0 before the first batch (see ``begin``).
    ``slopes``: the derivative of the bits in each latent, by part. ``bytes``: those of the file, about.
    """

    def __init__(self, latents: Latents, budget: ByteBudget, size: int):
        self.latents, self.budget = latents, budget
        self.price = 0.0
        self.slopes: dict[str, Tensor] = {}
        self.bytes = float(size)
        self._beside: float | None = None  # bytes that no price counts

    def begin(self, loss: float) -> None:
        """Set the first price, what a bit is worth at the loss D of the first batch: 2 ln 2 · D / n for n codes.

        For D falls by a factor of 2^(−2 b / n) with b more bits, if these are spent as well as the others.
        """
        if not self.price:
            self.price = 2 * math.log(2) * loss / max(1, sum(latent.value.numel() for latent in self.latents))
            _log.debug("the price of a bit starts at %.3g", self.price)

    def correct(self, size: float) -> None:
        """Take the real bytes of the file of the latents as they are now: norms and biases change it, too."""
        bits = sum(price.bits for _, price in prices(self.latents.whole(self.budget.rule())))
        self._beside, self.bytes = size - bits / 8, size

    def look(self) -> None:
        """Count the codes as they are now, and set the price of a bit."""
        bits = 0.0
        self.slopes = {}
        for parts, price in prices(self.latents.whole(self.budget.rule())):
            bits += price.bits
            for place, part in enumerate(parts):
                if part in self.latents:
                    self.slopes[part] = price.slope(place, self.latents[part].value.detach())
        if self._beside is None:
            self._beside = self.bytes - bits / 8
        before, self.bytes = self.bytes, self._beside + bits / 8
        over = self.bytes / (_AIM * self.budget.limit) - 1
        growth = (self.bytes - before) / self.budget.limit
        self.price *= math.exp(max(-_MOST, min(_MOST, _GAIN * over + _BRAKE * growth)))
        _log.debug("%.4f MB, a bit costs %.3g", self.bytes / 1e6, self.price)


class CodedAdam(torch.optim.AdamW):
    """AdamW on floats, by its ``groups``, and on latents, whose group is the last one; then the student gets its new weights.

    A row of a weight that a batch does not read (a token that does not occur) stays, and so do its moments.
    """

    def __init__(self, groups: list[dict[str, Any]], latents: Latents, rate: float, pressure: Pressure):
        self.latents, self.pressure = latents, pressure
        super().__init__([*groups, {"params": [one.value for one in latents], "lr": rate, "weight_decay": 0.0}], lr=rate)
        self._moments: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        self._steps = 0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:  # type: ignore[override]
        if self._steps % _EVERY == 0:
            self.pressure.look()
        self._steps += 1
        found = {part: latent.gradient() for part, latent in self.latents.items()}
        read = {part: one for part, one in found.items() if one is not None}
        for part, gradient in read.items():
            self._move(self.latents[part], gradient, self.pressure.slopes[part])
        done = super().step(closure)
        self.latents.write(self.pressure.budget.rule())
        return done

    def _move(self, latent: Latent, gradient: Tensor, slope: Tensor) -> None:
        rate = self.param_groups[-1]["lr"]
        if id(latent) not in self._moments:
            zeros = torch.zeros_like(gradient)
            self._moments[id(latent)] = (zeros, zeros.clone(), torch.zeros(len(gradient), 1, device=gradient.device))
        first, second, count = self._moments[id(latent)]
        rows = gradient.abs().amax(1) > 0
        every = bool(rows.all())
        value = latent.value.detach()
        if not every:
            whole = (first, second, count, value)
            first, second, count, value = (part[rows] for part in whole)
            gradient, slope = gradient[rows], slope[rows]
        gradient = gradient.add_(slope, alpha=self.pressure.price)
        count += 1
        first.lerp_(gradient, 1 - _BETAS[0])
        second.mul_(_BETAS[1]).addcmul_(gradient, gradient, value=1 - _BETAS[1])
        scale = (second / (1 - _BETAS[1] ** count)).sqrt_().add_(_TINY)
        value -= rate * (first / (1 - _BETAS[0] ** count)) / scale
        if not every:
            for part, new in zip(whole, (first, second, count, value), strict=True):
                part[rows] = new
