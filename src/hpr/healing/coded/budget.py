"""From trained latents to a coded file within its budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from hpr.anatomy.lookup import module_at, weight_of
from hpr.coding.record import Coded
from hpr.evaluation.cost import coded_bytes
from hpr.healing.coded.latents import Latents
from hpr.nn.coded import stored
from hpr.plans.rounding import Rounding, largest_code
from hpr.rounding.matrices import Rule
from hpr.rounding.others import round_others
from hpr.rounding.search import Rounded

_ATTEMPTS = 10
_CLOSE = 0.9995  # of the limit: a file that uses more is made no larger
_SAVED = 1.5  # bits, about, that a smaller code saves


@dataclass(frozen=True)
class ByteBudget:
    """What a coded file has to keep.

    ``limit``: its bytes. ``rounding``: how the model was rounded before; step and range of codes stay. ``sensitivities``:
    name → mean squared gradient of the parameters that are no site's weight (``Profile.others``), for their grids.
    """

    limit: int
    rounding: Rounding
    sensitivities: Mapping[str, float]

    def rule(self, threshold: float = 0.5) -> Rule:
        """How latents become codes."""
        return Rule(threshold, largest_code(self.rounding.bits))

    def file(self, student: nn.Module, latents: Latents, threshold: float = 0.5) -> Rounded:
        """The codes of the latents and of the student's other parameters, with the bytes of their file."""
        values = {name: parameter.detach() for name, parameter in student.named_parameters()}
        known = {name: value for name, value in self.sensitivities.items() if name in values}
        others = round_others(values, known, self.rounding.step)
        codes = latents.whole(self.rule(threshold))
        streams = {site: Coded.of(one) for site, one in codes.items()}
        return Rounded(codes, others, self.rounding, coded_bytes(student, streams, others), streams)

    def fit(self, student: nn.Module, latents: Latents, nearest: Rounded | None = None) -> Rounded | None:
        """The file within the limit; None if none was found. ``nearest``: the file of the latents rounded to nearest.

        It is that file if it fits. Else the threshold is raised from which a fraction of a step is rounded away from zero, so
        that the latents nearest to it become the smaller, cheaper number: as few of them as will do.
        """
        best, found = nearest or self.file(student, latents), None
        if best.bytes <= self.limit:
            return best
        margins = torch.cat([latent.margins() for latent in latents]).sort().values
        low, high = 0, len(margins)
        count = int(8 * (best.bytes - self.limit) / _SAVED) + 1
        for _ in range(_ATTEMPTS):
            count = min(count, high)
            best = self.file(student, latents, 0.5 + float(margins[count - 1]) if count else 0.5)
            if best.bytes <= self.limit:
                high, found = count, best
            else:
                low = count
            if high - low <= 1 or (found is not None and found.bytes >= _CLOSE * self.limit):
                break
            count = 2 * count if found is None else (low + high) // 2
        return found


@torch.no_grad()
def put(student: nn.Module, rounded: Rounded) -> None:
    """Put the numbers of the codes into a student, in place; numbers without codes become what the file stores."""
    for site, codes in rounded.codes.items():
        weight_of(module_at(student, site)).copy_(codes.weight())
    weights = {weight_of(module_at(student, site)).data_ptr() for site in rounded.codes}
    for name, parameter in student.named_parameters():
        if name in rounded.others:
            parameter.copy_(rounded.others[name].weight().view_as(parameter))
        elif parameter.data_ptr() not in weights:
            parameter.copy_(stored(parameter))
