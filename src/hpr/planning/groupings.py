"""Composite candidates for groupings that short runs of neighbouring layers cannot give.

The groupings follow the rules of the presets: cycles of pairs and of threes, reversed cycles of pairs, two halves, and a
sandwich with one group in the middle. A further grouping matches layers in pairs for the greatest gain from sharing. Groups
of layers that are not neighbours, or that are longer than the planner's longest run, use the cheap operators only: shared
bases, and tie if the weights are similar. Any group may also stay private; its damage is then that of its members alone. The
solver chooses a grouping by its damage. Similarity only decides which pairs to measure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise

import networkx

from hpr.operators.metric import Measured
from hpr.operators.registry import OPERATORS
from hpr.operators.tie import Group, alike
from hpr.planning.presets import Preset
from hpr.solver.candidates import Candidate
from hpr.solver.composite import compose, hull

MATCHING = "matching"
Intervals = Mapping[tuple[int, int], tuple[Candidate, ...]]
Members = tuple[int, ...]  # positions of a group, in order
Similar = Callable[[int, int], float | None]  # of two positions, None if unknown


class Groups:
    """The candidates of any group of a track's positions; each group is measured once.

    A run of neighbours has the candidates of its run, any other group those of the cheap operators.
    """

    def __init__(self, row: Sequence[Measured], runs: Intervals, allowed: set[str]):
        self._row, self._runs = row, runs
        quick = [operator for name, operator in OPERATORS.items() if operator.shared and operator.quick and name in allowed]
        self._bases = [operator.candidate for operator in quick if not operator.merges]
        self._merging = [operator.candidate for operator in quick if operator.merges]
        self._measured: dict[Members, tuple[Candidate, ...]] = {}

    def shared(self, members: Members) -> tuple[Candidate, ...]:
        """The candidates that share between these positions; empty if no operator applies."""
        run = (members[0], members[-1] + 1)
        if len(members) == run[1] - run[0] and run in self._runs:
            return self._runs[run]
        if members not in self._measured:
            group = Group(self._row[index] for index in members)
            candidates = [candidate(group) for candidate in self._bases]
            if self._merging and (alike(group) or not self._bases):
                candidates += [candidate(group) for candidate in self._merging]
            self._measured[members] = tuple(candidate for candidate in candidates if candidate is not None)
        return self._measured[members]

    def alone(self, members: Members) -> Candidate:
        """One candidate that keeps these positions private."""
        return compose("alone", range(len(members)), [self._runs[index, index + 1] for index in members])

    def options(self, members: Members) -> tuple[Candidate, ...]:
        """All candidates that a composite may choose from for one of its groups."""
        if len(members) == 1:
            return self._runs[members[0], members[0] + 1]
        return (*self.shared(members), self.alone(members))

    def measured(self, start: int, stop: int) -> list[Members]:
        """The pairs in [start, stop) that are measured already."""
        runs: list[Members] = [(index, index + 1) for index in range(start, stop - 1) if (index, index + 2) in self._runs]
        others = [group for group in self._measured if len(group) == 2 and start <= group[0] and group[1] < stop]
        return runs + others


def composites(groups: Groups, start: int, stop: int, longest: int, lower: int, similar: Similar) -> Iterator[Candidate]:
    """Yields a candidate of the positions [start, stop) for every grouping that runs up to ``longest`` cannot give.

    ``lower``: the number of positions that belong to the lower of two stacks, 0 for one stack. With two stacks one grouping
    is ``cycle(groups=lower)``, which groups each layer of the lower stack with the same layer of the upper stack.
    """
    length = stop - start
    for name, partition in rules(length, longest, lower).items():
        yield from _composite(groups, name, partition, start)
    for index in range(start, stop):
        scores = {other: similar(index, other) for other in range(start, stop) if abs(other - index) > 1}
        known_scores = {other: score for other, score in scores.items() if score is not None}
        if known_scores:
            groups.shared(tuple(sorted((index, max(known_scores, key=known_scores.__getitem__)))))
    partition = matching(groups, start, stop)
    if not _reached(partition, longest):
        yield from _composite(groups, MATCHING, partition, start)


def rules(length: int, longest: int, lower: int = 0) -> dict[str, tuple[int, ...]]:
    """Preset → the group of each position. Leaves out repeats, and groupings that runs up to ``longest`` can give."""
    pairs, threes = math.ceil(length / 2), math.ceil(length / 3)
    presets = [Preset("cycle", pairs), Preset("cycle", threes), Preset("cycle_rev", pairs), Preset("sequence", 2)]
    names: dict[tuple[int, ...], str] = {}
    for preset in ([Preset("cycle", lower)] if lower else []) + presets + [Preset("sandwich", 3)]:
        if 1 < preset.number < length and not _reached(partition := preset.assign(length), longest):
            names.setdefault(partition, str(preset))
    return {name: partition for partition, name in names.items()}


def matching(groups: Groups, start: int, stop: int) -> tuple[int, ...]:
    """The group of each position if as many positions as possible are paired, at the greatest total gain.

    Only measured pairs count. The gain of a pair, in nats per example, is the damage of its private members minus the damage
    of sharing, both at half the parameters of its members.
    """
    graph = networkx.Graph()
    for pair in groups.measured(start, stop):
        if shared := groups.shared(pair):
            size = sum(int(groups.options((index,))[0].parameters.max()) for index in pair) / 2
            gain = hull((groups.alone(pair),)).damage_at(size) - hull(shared).damage_at(size)
            graph.add_edge(*pair, weight=gain)
    partner = {}
    for first, second in networkx.max_weight_matching(graph, maxcardinality=True):
        partner[max(first, second)] = min(first, second)
    numbers: dict[int, int] = {}
    for index in range(start, stop):
        numbers[index] = numbers[partner[index]] if index in partner else len(set(numbers.values()))
    return tuple(numbers.values())


def _composite(groups: Groups, name: str, partition: tuple[int, ...], start: int) -> Iterator[Candidate]:
    members = [
        tuple(start + index for index, number in enumerate(partition) if number == group) for group in range(max(partition) + 1)
    ]
    if any(len(group) > 1 and groups.shared(group) for group in members):
        yield compose(name, partition, [groups.options(group) for group in members])


def _reached(partition: Sequence[int], longest: int) -> bool:
    """Whether runs of neighbours up to ``longest`` give this grouping."""
    runs = 1 + sum(lower != upper for lower, upper in pairwise(partition))
    return runs == len(set(partition)) and max(map(list(partition).count, partition)) <= longest
