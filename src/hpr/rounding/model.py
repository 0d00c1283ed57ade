"""Round every weight of a model with one step size, and put the rounded numbers in place of the original ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from hpr.anatomy.describe import describe
from hpr.anatomy.lookup import module_at, weight_at
from hpr.coding.codes import Codes, Product
from hpr.coding.record import Coded
from hpr.errors import PlanError
from hpr.nn.coded import attach_codes, refuse_coded, stored
from hpr.operators.metric import weight64
from hpr.plans.rounding import Rounding, largest_code
from hpr.profiling.other_parameters import other_parameters
from hpr.profiling.profile import Profile
from hpr.rounding.matrices import Rule
from hpr.rounding.others import round_others
from hpr.rounding.products import Factoring
from hpr.rounding.sites import THRESHOLD, powers, round_sites
from hpr.rounding.whitening import Roots, Whitened
from hpr.runtime.hooks import forget_computed
from hpr.runtime.progress import progress

_TOGETHER = 1 << 23  # numbers that are rounded at once, which bounds the memory


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
        roots = Roots(output_damping, input_damping)
        self.model = model
        self.profile = profile
        self.dampings = (output_damping, input_damping)
        self.bits = bits
        self._others = {name: parameter.detach() for name, parameter in other_parameters(model, anatomy).items()}
        self.ranks: dict[str, int] = {}
        self.products: list[tuple[Factoring, int]] = []
        self.sites = [roots.whiten(site, weight64(model, site), profile.sites[site.name]) for site in anatomy.sites]

    def codes(self, step: float) -> dict[str, Codes | Product]:
        """The codes of every site by its name, at a step size (see ``Rounding``)."""
        codes: dict[str, Codes | Product] = {}
        rule = Rule(THRESHOLD, largest_code(self.bits))
        for group in self._groups():
            rounded = round_sites(group, step, rule)
            codes |= {whitened.site.name: found for whitened, found in zip(group, rounded, strict=True)}
            progress("rounding", len(codes), len(self.sites))
        for factoring, rank in self.products:
            codes[factoring.site.name] = factoring.codes(rank, step)
            progress("rounding", len(codes), len(self.sites))
        return {whitened.site.name: codes[whitened.site.name] for whitened in self.sites}

    def factored(self, ranks: Mapping[str, int]) -> Rounder:
        """The same, but the sites with a rank become products of two factors. Raises ``PlanError`` for one without gradient."""
        made = copy.copy(self)
        made.ranks = dict(ranks)
        made.products = []
        for whitened in self.sites:
            if whitened.site.name in ranks:
                if not whitened.read:
                    raise PlanError(f"{whitened.site.name} has a rank, but no gradient to choose factors by: keep it whole")
                made.products.append((self.factoring(whitened), ranks[whitened.site.name]))
        return made

    def factoring(self, whitened: Whitened) -> Factoring:
        """A site that has a gradient, prepared to become a product."""
        return Factoring.of(whitened, self.profile.sites[whitened.site.name], self.dampings)

    def rounding(self, step: float) -> Rounding:
        """What a plan says of the codes at a step size."""
        return Rounding(step, *self.dampings, self.bits)

    @property
    def finest(self) -> float:
        """The least step that a search tries: the largest weight has a code of 30 bits. Feedback adds some hundreds to it."""
        sizes = [
            float((whitened.weight.abs() / (rows[:, None] * columns)).max())
            for whitened in self.sites
            if whitened.read
            for rows, columns in [(powers(whitened.rows, whitened.weight), powers(whitened.columns, whitened.weight))]
        ]
        return max(sizes, default=1.0) / 2**30 or 1.0

    def others(self, codes: Mapping[str, Codes | Product], step: float) -> dict[str, Codes]:
        """The codes of parameters that are no site's weight, by name. Biases absorb what rounding does to the mean output."""
        return round_others(self._corrected(codes), self.profile.others, step)

    def student(
        self, codes: Mapping[str, Codes | Product], others: Mapping[str, Codes], coded: Mapping[str, Coded] | None = None
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
        forget_computed(student)
        if coded is not None:
            attach_codes(student, coded, self.profile.about.get("objective"), others)
        return student

    def _corrected(self, codes: Mapping[str, Codes | Product]) -> dict[str, Tensor]:
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
        """Sites of one shape that are no products, as many together as memory allows."""
        kinds: dict[tuple[object, ...], list[Whitened]] = {}
        factored = {factoring.site.name for factoring, _ in self.products}
        for whitened in (whitened for whitened in self.sites if whitened.site.name not in factored):
            kinds.setdefault(whitened.kind, []).append(whitened)
        for sites in kinds.values():
            count = max(1, _TOGETHER // sites[0].weight.numel())
            for start in range(0, len(sites), count):
                yield sites[start : start + count]
