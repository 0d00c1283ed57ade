"""Groupings that no segmentation of a track into short runs can give, as composite candidates for the planner.

The rules are those of the presets: cycles of pairs and of threes, reversed cycles of pairs, two halves, a sandwich with one
middle. Besides, layers are matched in pairs so that sharing gains most. Groups of layers that are no neighbours, or of more
than the planner's longest run, are offered the cheap operators only: shared bases, and tie where the weights themselves are
alike. Any group may also stay private, at what its members cost alone. Damage decides whether a grouping is taken; similarity
only says which pairs to measure.
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
Similar = Callable[[int, int], float | None]  # of two positions, None where it is not known


class Groups:
    """The candidates of any group of a track's positions, each measured once: its own runs, else the cheap operators."""

    def __init__(self, row: Sequence[Measured], runs: Intervals, allowed: set[str]):
        self._row, self._runs = row, runs
        quick = [one for name, one in OPERATORS.items() if one.shared and one.quick and name in allowed]
        self._bases = [operator.candidate for operator in quick if not operator.merges]
        self._merging = [operator.candidate for operator in quick if operator.merges]
        self._measured: dict[Members, tuple[Candidate, ...]] = {}

    def shared(self, members: Members) -> tuple[Candidate, ...]:
        """What these positions may share, empty where no operator applies."""
        run = (members[0], members[-1] + 1)
        if len(members) == run[1] - run[0] and run in self._runs:
            return self._runs[run]
        if members not in self._measured:
            group = Group(self._row[index] for index in members)
            found = [candidate(group) for candidate in self._bases]
            if self._merging and (alike(group) or not self._bases):
                found += [candidate(group) for candidate in self._merging]
            self._measured[members] = tuple(one for one in found if one is not None)
        return self._measured[members]

    def alone(self, members: Members) -> Candidate:
        """Every position by itself."""
        return compose("alone", range(len(members)), [self._runs[index, index + 1] for index in members])

    def options(self, members: Members) -> tuple[Candidate, ...]:
        """All that a group of a composite may choose from."""
        if len(members) == 1:
            return self._runs[members[0], members[0] + 1]
        return (*self.shared(members), self.alone(members))

    def measured(self, start: int, stop: int) -> list[Members]:
        """The pairs between two positions that have candidates by now."""
        runs: list[Members] = [(index, index + 1) for index in range(start, stop - 1) if (index, index + 2) in self._runs]
        others = [group for group in self._measured if len(group) == 2 and start <= group[0] and group[1] < stop]
        return runs + others


def composites(groups: Groups, start: int, stop: int, longest: int, lower: int, similar: Similar) -> Iterator[Candidate]:
    """Candidates for the positions [start, stop): one for every grouping that runs up to ``longest`` cannot give.

    ``lower``: how many of them belong to a lower stack, if the positions are those of two; each of its layers is then put
    together with the same layer of the upper one, as ``cycle(groups=lower)``.
    """
    length = stop - start
    for name, partition in rules(length, longest, lower).items():
        yield from _composite(groups, name, partition, start)
    for index in range(start, stop):
        scores = {other: similar(index, other) for other in range(start, stop) if abs(other - index) > 1}
        known = {other: score for other, score in scores.items() if score is not None}
        if known:
            groups.shared(tuple(sorted((index, max(known, key=known.__getitem__)))))
    partition = matching(groups, start, stop)
    if not _reached(partition, longest):
        yield from _composite(groups, MATCHING, partition, start)


def rules(length: int, longest: int, lower: int = 0) -> dict[str, tuple[int, ...]]:
    """Preset → the group of each position, without repeats, and without what runs up to ``longest`` can give."""
    pairs, threes = math.ceil(length / 2), math.ceil(length / 3)
    presets = [Preset("cycle", pairs), Preset("cycle", threes), Preset("cycle_rev", pairs), Preset("sequence", 2)]
    found: dict[tuple[int, ...], str] = {}
    for preset in ([Preset("cycle", lower)] if lower else []) + presets + [Preset("sandwich", 3)]:
        if 1 < preset.number < length and not _reached(partition := preset.assign(length), longest):
            found.setdefault(partition, str(preset))
    return {name: partition for partition, name in found.items()}


def matching(groups: Groups, start: int, stop: int) -> tuple[int, ...]:
    """The group of each position where as many as possible are paired, among the pairs measured, at the greatest gain.

    A pair's gain is the damage of its members alone minus that of sharing, both at half the parameters of keeping them.
    """
    graph = networkx.Graph()
    for pair in groups.measured(start, stop):
        if shared := groups.shared(pair):
            size = sum(int(groups.options((index,))[0].parameters.max()) for index in pair) / 2
            gain = hull((groups.alone(pair),)).damage_at(size) - hull(shared).damage_at(size)
            graph.add_edge(*pair, weight=gain)
    partner = {}
    for one, other in networkx.max_weight_matching(graph, maxcardinality=True):
        partner[max(one, other)] = min(one, other)
    numbers: dict[int, int] = {}
    for index in range(start, stop):
        numbers[index] = numbers[partner[index]] if index in partner else len(set(numbers.values()))
    return tuple(numbers.values())


def _composite(groups: Groups, name: str, partition: tuple[int, ...], start: int) -> Iterator[Candidate]:
    members = [
        tuple(start + index for index, own in enumerate(partition) if own == group) for group in range(max(partition) + 1)
    ]
    if any(len(group) > 1 and groups.shared(group) for group in members):
        yield compose(name, partition, [groups.options(group) for group in members])


def _reached(partition: Sequence[int], longest: int) -> bool:
    """Whether runs of neighbours up to ``longest`` give this grouping."""
    runs = 1 + sum(one != other for one, other in pairwise(partition))
    return runs == len(set(partition)) and max(map(list(partition).count, partition)) <= longest
