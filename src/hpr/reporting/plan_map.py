"""The plan as a map: layers by slots, who shares a factor with whom, and at which rank.

Everything is derived from the saved plan. Two sites that name the same factor share it; the set of a factor's users is a
*group*. A site may be in several groups, one inside the other (``base + block + private``): the smallest gives the cell
its hue, the wider ones a strip at its foot.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from hpr.reporting.formatting import dig, figure, number, records, table

HUES = 7
_KEEP = "keep"
_FACTORS = ("u", "v", "row_scale", "column_scale")


@dataclass(frozen=True)
class Group:
    """Sites that share a factor: a letter that is theirs alone, and a hue that sets them apart within a row."""

    label: str
    hue: int
    sites: tuple[str, ...]


@dataclass(frozen=True)
class Segment:
    """Rows [start, stop) of a site and what represents them; ``text`` is empty where a lane has a hole."""

    start: int
    stop: int
    text: str

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Cell:
    """One site on the map. ``kind`` is keep, shared, private or gone.

    ``whole`` holds the ranks of the terms over all rows, ``lanes`` the row segments, where a site has any.
    """

    site: str
    operator: str
    code: str
    rank: str
    kind: str
    damage: float | None
    whole: str = ""
    groups: tuple[Group, ...] = ()
    lanes: tuple[tuple[Segment, ...], ...] = ()
    joins_left: bool = False
    joins_right: bool = False

    @property
    def partners(self) -> tuple[str, ...]:
        """The other sites that use any of this one's factors, nearest group first."""
        others = [site for group in self.groups for site in group.sites if site != self.site]
        return tuple(dict.fromkeys(others))

    @property
    def hover(self) -> str:
        shares = f"; shares with {', '.join(self.partners)}" if self.partners else ""
        damage = f"; predicted damage {figure(self.damage, 'nats')}" if self.damage is not None else ""
        return f"{self.site}: {self.operator}{f', rank {self.rank}' if self.rank != _KEEP else ''}{shares}{damage}"


@dataclass(frozen=True)
class Row:
    """One slot over all layers of its stack; None where a layer has no such matrix."""

    slot: str
    cells: tuple[Cell | None, ...]

    @property
    def damage(self) -> float | None:
        known = [cell.damage for cell in self.cells if cell and cell.damage is not None]
        return sum(known) if known else None

    @property
    def boundaries(self) -> tuple[bool, ...]:
        """Whether the plan starts a new group between each layer and the next."""
        return boundaries([self])


@dataclass(frozen=True)
class StackMap:
    """One stack: its rows, each with a cell per layer."""

    name: str
    layers: int
    rows: tuple[Row, ...]

    @property
    def cells(self) -> list[Cell]:
        return [cell for row in self.rows for cell in row.cells if cell]


@dataclass(frozen=True)
class Operator:
    """An operator as the legend shows it."""

    name: str
    code: str
    sites: int
    damage: float | None


@dataclass(frozen=True)
class PlanMap:
    """The whole plan: stacks, the sites outside them, groups and operators."""

    stacks: tuple[StackMap, ...]
    outside: tuple[Cell, ...]
    groups: tuple[Group, ...]
    operators: tuple[Operator, ...]

    @property
    def cells(self) -> list[Cell]:
        return [cell for stack in self.stacks for cell in stack.cells] + list(self.outside)


def read_plan(plan: Mapping[str, Any]) -> PlanMap:
    """Lay a saved plan out as a map. Sites appear by their labels: ``encoder.3.output.dense``."""
    sites, places = {}, {}
    for name, entry in table(plan, "sites").items():
        if isinstance(entry, Mapping):
            stack, layer, slot = place = _place(str(name), table(plan, "stacks"))
            label = slot if layer < 0 else ".".join([*([stack] if stack else []), str(layer), slot])
            sites[label], places[label] = entry, place
    order = {name: index for index, name in enumerate(_by_row(places))}
    groups = _groups(sites, places, order)
    codes = _codes(str(entry.get("operator")) for entry in sites.values())
    cells = {name: _cell(name, sites[name], codes, groups) for name in order}

    layers: dict[str, int] = defaultdict(int)
    rows: dict[tuple[str, str], dict[int, Cell]] = defaultdict(dict)
    for name, (stack, layer, slot) in places.items():
        if layer >= 0:
            layers[stack] = max(layers[stack], layer + 1)
            rows[stack, slot][layer] = cells[name]
    stack_maps = tuple(
        StackMap(stack, depth, tuple(_row(slot, found, depth) for (owner, slot), found in rows.items() if owner == stack))
        for stack, depth in layers.items()
    )
    outside = tuple(cells[name] for name, (_, layer, _) in places.items() if layer < 0)
    return PlanMap(stack_maps, outside, tuple(groups), _operators(cells.values()))


def boundaries(rows: Iterable[Row]) -> tuple[bool, ...]:
    """Whether the plan starts a new group between each cell and the next, along rows that continue one another."""
    return tuple(not _joined(one, other) for one, other in pairwise(cell for row in rows for cell in row.cells))


def _place(name: str, stacks: Mapping[str, Any]) -> tuple[str, int, str]:
    """(stack, layer, slot) of a site by its path; layer −1 outside the stacks."""
    for stack, known in stacks.items():
        path, layers = dig(known, "path"), number(dig(known, "layers")) or 0
        start = f"{path}." if path else ""
        if isinstance(path, str) and name.startswith(start):
            layer, _, slot = name.removeprefix(start).partition(".")
            if slot and layer.isdecimal() and int(layer) < layers:
                return str(stack), int(layer), slot
    return "", -1, name


def _by_row(places: Mapping[str, tuple[str, int, str]]) -> list[str]:
    """Site names row by row: the order in which groups get their letters."""
    rows: dict[tuple[str, str], list[tuple[int, str]]] = defaultdict(list)
    for name, (stack, layer, slot) in places.items():
        rows[stack, slot].append((layer, name))
    return [name for row in rows.values() for _, name in sorted(row)]


def _groups(sites: Mapping[str, Any], places: Mapping[str, tuple[str, int, str]], order: Mapping[str, int]) -> list[Group]:
    users: dict[str, set[str]] = defaultdict(set)
    for name, entry in sites.items():
        for term in records(entry, "terms"):
            for factor in (term.get(key) for key in _FACTORS):
                if factor:
                    users[str(factor)].add(name)
    owner_sets = {tuple(sorted(names, key=order.__getitem__)) for names in users.values() if len(names) > 1}
    groups: list[Group] = []
    taken: dict[tuple[str, str], Counter[int]] = defaultdict(lambda: Counter(dict.fromkeys(range(HUES), 0)))
    for members in sorted(owner_sets, key=lambda names: (order[names[0]], -len(names))):
        rows = {(places[name][0], places[name][2]) for name in members}
        hue = min(range(HUES), key=lambda hue: (sum(taken[row][hue] for row in rows), hue))
        for row in rows:
            taken[row][hue] += 1
        groups.append(Group(_letters(len(groups)), hue, members))
    return groups


def _letters(index: int) -> str:
    """0 → A, 25 → Z, 26 → AA."""
    head, tail = divmod(index, 26)
    return (_letters(head - 1) if head else "") + chr(ord("A") + tail)


def _cell(name: str, entry: Mapping[str, Any], codes: Mapping[str, str], groups: list[Group]) -> Cell:
    operator, terms = str(entry.get("operator")), records(entry, "terms")
    mine = tuple(sorted((group for group in groups if name in group.sites), key=lambda group: len(group.sites)))
    whole = [_rank(term) for term in terms if not term.get("rows")]
    lanes = _lanes([term for term in terms if term.get("rows")])
    pieces = ["/".join(segment.text for segment in lane if segment.text) for lane in lanes]
    if operator == _KEEP:
        kind, rank = "keep", _KEEP
    elif not terms:
        kind, rank = "gone", "–"
    else:
        kind, rank = "shared" if mine else "private", "+".join(whole + pieces)
    return Cell(name, operator, codes[operator], rank, kind, number(entry.get("damage")), "+".join(whole), mine, lanes)


def _rank(term: Mapping[str, Any]) -> str:
    """The rank of a term; ``full`` where its first factor is the whole matrix."""
    return "full" if term.get("v") is None else str(term.get("rank") or "?")


def _lanes(terms: list[Mapping[str, Any]]) -> tuple[tuple[Segment, ...], ...]:
    """Row-limited terms as strips, side by side where they do not overlap and one above the other where they do."""
    lanes: list[list[Segment]] = []
    for term in sorted(terms, key=lambda term: tuple(term["rows"])):
        segment = Segment(int(term["rows"][0]), int(term["rows"][1]), _rank(term))
        lane = next((lane for lane in lanes if lane[-1].stop <= segment.start), None)
        if lane is None:
            lanes.append(lane := [])
        end = lane[-1].stop if lane else 0
        if end < segment.start:
            lane.append(Segment(end, segment.start, ""))
        lane.append(segment)
    return tuple(tuple(lane) for lane in lanes)


def _row(slot: str, found: Mapping[int, Cell], depth: int) -> Row:
    cells: list[Cell | None] = [found.get(layer) for layer in range(depth)]
    joined = [_joined(one, other) for one, other in pairwise(cells)]
    for layer, cell in enumerate(cells):
        if cell:
            left, right = layer > 0 and joined[layer - 1], layer < len(joined) and joined[layer]
            cells[layer] = replace(cell, joins_left=left, joins_right=right)
    return Row(slot, tuple(cells))


def _joined(one: Cell | None, other: Cell | None) -> bool:
    return bool(one and other and one.groups and other.groups and one.groups[0] == other.groups[0])


def _codes(operators: Iterable[str]) -> dict[str, str]:
    """A short code for every operator, from its words: low rank → lr, tie + delta → t+d, segments → seg."""
    codes: dict[str, str] = {}
    for name in sorted(set(operators)):
        parts = [part.split() for part in name.split("+")]
        if len(parts) == 1 and len(parts[0]) == 1:
            code = name if len(name) <= 4 else name[:3]
        else:
            code = "+".join("".join(word[0] for word in part) for part in parts)[:7]
        tail = "" if code not in codes.values() else str(sum(other.startswith(code) for other in codes.values()) + 1)
        codes[name] = code + tail
    return codes


def _operators(cells: Iterable[Cell]) -> tuple[Operator, ...]:
    found: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        found[cell.operator].append(cell)
    legend = []
    for name, users in found.items():
        damages = [cell.damage for cell in users if cell.damage is not None]
        legend.append(Operator(name, users[0].code, len(users), sum(damages) if damages else None))
    return tuple(sorted(legend, key=lambda operator: -operator.sites))
