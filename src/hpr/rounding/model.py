"""Round every weight of a model with one step size, and put the rounded numbers in place of the original ones."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from hpr.anatomy.describe import describe
from hpr.anatomy.lookup import module_at, weight_at
from hpr.coding.codes import Codes, half_octaves
from hpr.coding.record import Coded
from hpr.errors import PlanError
from hpr.nn.coded import attach_codes, refuse_coded, stored
from hpr.operators.metric import weight64
from hpr.plans.rounding import largest_code
from hpr.profiling.other_parameters import other_parameters
from hpr.profiling.profile import Profile
from hpr.rounding.matrices import Rule, round_matrices
from hpr.rounding.others import round_others
from hpr.rounding.ranges import coarser
from hpr.rounding.whitening import Roots, Whitened
from hpr.runtime.progress import progress

THRESHOLD = 0.55  # of a step: a little above a half, since the smaller code is the cheaper one
_LARGEST_CODE = 2**31 - 1
_TOGETHER = 1 << 23  # numbers that are rounded at once, which bounds the memory

Grid = tuple[np.ndarray, np.ndarray]  # exponents of rows and columns


class Rounder:
    """A model prepared for rounding at any step: its weights whitened by a profile, with given dampings.

    ``bits``: those of a code (see ``Rounding``), None for as many as it takes.
    """

    def __init__(
        self, model: nn.Module, profile: Profile, output_damping: float, input_damping: float, bits: int | None = None
    ):
        refuse_coded(model, "rounded again")
        anatomy = describe(model)
        profile.check(anatomy)
        if experts := [site.name for site in anatomy.sites if site.expert is not None]:
            raise PlanError(
                f"a budget in bytes does not cover experts that are slices of one parameter ({experts[0]}): give a budget in "
                f"parameters, such as 50%"
            )
        roots = Roots(output_damping, input_damping)
        self.model = model
        self.profile = profile
        self.dampings = (output_damping, input_damping)
        self.bits = bits
        self._others = {name: parameter.detach() for name, parameter in other_parameters(model, anatomy).items()}
        self.sites = [roots.whiten(site, weight64(model, site), profile.sites[site.name]) for site in anatomy.sites]

    def codes(self, step: float) -> dict[str, Codes]:
        """The codes of every site by its name, at a step size (see ``Rounding``)."""
        codes: dict[str, Codes] = {}
        rule = Rule(THRESHOLD, largest_code(self.bits))
        for group in self._groups():
            grids = [_grid(whitened, step, rule.largest) for whitened in group]
            for whitened, grid, values in zip(group, grids, _rounded(group, grids, step, rule), strict=True):
                site = whitened.site.name
                codes[site] = Codes(_integers(values, site), *grid, whitened.scale(step))
            progress("rounding", len(codes), len(self.sites))
        return {whitened.site.name: codes[whitened.site.name] for whitened in self.sites}

    @property
    def finest(self) -> float:
        """The least step that a search tries: the largest weight has a code of 30 bits. Feedback adds some hundreds to it."""
        sizes = [
            float((whitened.weight.abs() / (rows[:, None] * columns)).max())
            for whitened in self.sites
            if whitened.read
            for rows, columns in [(_powers(whitened.rows, whitened.weight), _powers(whitened.columns, whitened.weight))]
        ]
        return max(sizes, default=1.0) / 2**30 or 1.0

    def others(self, codes: Mapping[str, Codes], step: float) -> dict[str, Codes]:
        """The codes of parameters that are no site's weight, by name. Biases absorb what rounding does to the mean output."""
        return round_others(self._corrected(codes), self.profile.others, step)

    def student(
        self, codes: Mapping[str, Codes], others: Mapping[str, Codes], coded: Mapping[str, Coded] | None = None
    ) -> nn.Module:
        """A copy of the model with the rounded numbers in it; with ``coded``, the streams of the codes, it can be saved.

        Numbers without codes are rounded to half precision, in which ``save`` stores them.
        """
        student = copy.deepcopy(self.model)
        with torch.no_grad():
            parameters = dict(student.named_parameters())
            for name, found in others.items():
                parameters[name].copy_(found.weight().view_as(parameters[name]))
            if self._others.keys() - others.keys():
                for name, value in self._corrected(codes).items():
                    if name not in others:
                        parameters[name].copy_(stored(value))
            for whitened in self.sites:
                weight_at(student, whitened.site).copy_(codes[whitened.site.name].weight())
            for tensor in student.state_dict(keep_vars=True).values():
                if not isinstance(tensor, nn.Parameter):  # a buffer that is saved
                    tensor.copy_(stored(tensor))
        if coded is not None:
            attach_codes(student, coded, self.profile.about.get("objective"), others)
        return student

    def _corrected(self, codes: Mapping[str, Codes]) -> dict[str, Tensor]:
        """The parameters beside the weights of sites, with biases that absorb what rounding does to the mean output."""
        values = dict(self._others)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        for whitened in self.sites:
            site = whitened.site
            mean = self.profile.sites[site.name].mean
            if mean is not None and site.has_bias:
                bias = module_at(self.model, site.name).bias
                name = names[id(bias)]
                rounded = codes[site.name].weight().to(whitened.weight)
                change = (whitened.weight - rounded) @ mean.to(whitened.weight)
                values[name] = values[name] + change.to(values[name])
        return values

    def _groups(self) -> Iterator[list[Whitened]]:
        """Sites of one shape, as many together as memory allows."""
        kinds: dict[tuple[object, ...], list[Whitened]] = {}
        for whitened in self.sites:
            kinds.setdefault(whitened.kind, []).append(whitened)
        for sites in kinds.values():
            count = max(1, _TOGETHER // sites[0].weight.numel())
            for start in range(0, len(sites), count):
                yield sites[start : start + count]


def _grid(whitened: Whitened, step: float, largest: float) -> Grid:
    if largest == math.inf:
        return whitened.rows, whitened.columns
    like = whitened.weight
    sizes = like.abs() / whitened.scale(step) / _powers(whitened.rows, like)[:, None] / _powers(whitened.columns, like)
    rows, columns = coarser(sizes, largest)
    return whitened.rows + rows, whitened.columns + columns


def _rounded(group: list[Whitened], grids: list[Grid], step: float, rule: Rule) -> Tensor:
    weights = torch.stack([whitened.weight for whitened in group])
    rows = torch.stack([whitened.scale(step) * _powers(grid[0], weights) for whitened, grid in zip(group, grids, strict=True)])
    columns = torch.stack([_powers(grid[1], weights) for grid in grids])
    sides = (
        None if group[0].left is None else torch.stack([whitened.left for whitened in group]),  # type: ignore[misc]
        None if group[0].right is None else torch.stack([whitened.right for whitened in group]),  # type: ignore[misc]
    )
    return round_matrices(weights, (rows, columns), sides, rule)


def _powers(exponents: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(half_octaves(exponents)).to(like)


def _integers(values: Tensor, site: str) -> np.ndarray:
    """Whole numbers as int32. Raises ``PlanError`` for numbers outside its range: the step is far too fine."""
    if not float(values.abs().max()) < _LARGEST_CODE:  # not finite is no code, either
        raise PlanError(f"codes of {site} are above {_LARGEST_CODE:,} at this step: give a larger step, or plan anew")
    return values.cpu().numpy().astype(np.int32)
