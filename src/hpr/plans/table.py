"""Read the table of a plan: layers by slots, which sites share a factor, and at which rank.

Everything is read from the JSON form of the plan, which is what ``Plan.to_dict`` returns. Two sites that name the same factor
share it; the set of sites that use a factor is a *group*. A site may be in several groups, one inside the other (``base +
block + private``): the smallest group comes first.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from hpr.plans.json_values import dig, number
from hpr.plans.terms import KEEP

HUES = 7
CODED = "coded"  # the kind of a site that is rounded and coded
_FACTORS = ("u", "v", "row_scale", "column_scale")


@dataclass(frozen=True)
class Group:
    """Sites that share a factor. ``label``: a letter that no other group has; ``hue``: 0 to 6.

    A group gets a hue that the groups of its rows do not have, if there is one, and of these the hue that is used least.
    """

    label: str
    hue: int
    sites: tuple[str, ...]


@dataclass(frozen=True)
class Segment:
    """Rows [start, stop) of a site and the rank that represents them; ``text`` is empty for rows without a term."""

    start: int
    stop: int
    text: str

    @property
    def rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Cell:
    """One site of the table. ``kind`` is keep, coded, shared, private or gone (no weights are left).

    ``rank`` of a site that is rounded and coded: the mean number of bits of a number.

    ``whole`` holds the ranks of the terms over all rows, ``lanes`` those of the terms over some rows.
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
        """The other sites that use a factor of this site, the smallest group first."""
        others = [site for group in self.groups for site in group.sites if site != self.site]
        return tuple(dict.fromkeys(others))

    @property
    def word(self) -> str:
        """``keep``, the code of the operator and the rank (``lr 93``), or the bits of a number (``2.13 bits``)."""
        if self.kind == CODED:
            return f"{self.rank} bits"
        return KEEP if self.kind == KEEP else f"{self.code} {self.rank}"


@dataclass(frozen=True)
class Row:
    """One slot over all layers of its stack; the cell is None if a layer has no such matrix."""

    slot: str
    cells: tuple[Cell | None, ...]

    @property
    def damage(self) -> float | None:
        damages = [cell.damage for cell in self.cells if cell and cell.damage is not None]
        return sum(damages) if damages else None

    @property
    def boundaries(self) -> tuple[bool, ...]:
        """Whether the plan starts a new group between each layer and the next."""
        return boundaries([self])


@dataclass(frozen=True)
class StackMap:
    """One stack: its rows, each with one cell per layer."""

    name: str
    layers: int
    rows: tuple[Row, ...]

    @property
    def cells(self) -> list[Cell]:
        return [cell for row in self.rows for cell in row.cells if cell]


@dataclass(frozen=True)
class OperatorUse:
    """An operator, its short code, how many sites use it, and their predicted damage together."""

    name: str
    code: str
    sites: int
    damage: float | None


@dataclass(frozen=True)
class PlanMap:
    """The whole plan: stacks, the sites outside the stacks, groups and operators."""

    stacks: tuple[StackMap, ...]
    outside: tuple[Cell, ...]
    groups: tuple[Group, ...]
    operators: tuple[OperatorUse, ...]

    @property
    def cells(self) -> list[Cell]:
        return [cell for stack in self.stacks for cell in stack.cells] + list(self.outside)


def read_plan(plan: Mapping[str, Any]) -> PlanMap:
    """The table of a plan in its JSON form. Sites are named by their labels: ``encoder.3.output.dense``."""
    sites, places, bits = {}, {}, {}
    sizes = dig(plan, "diagnostics", "bits")
    for name, entry in _mapping(plan, "sites").items():
        if isinstance(entry, Mapping):
            stack, layer, slot = place = _place(str(name), _mapping(plan, "stacks"))
            label = slot if layer < 0 else ".".join([*([stack] if stack else []), str(layer), slot])
            sites[label], places[label] = entry, place
            bits[label] = number(sizes.get(name)) if isinstance(sizes, Mapping) else None
    order = {name: index for index, name in enumerate(_by_row(places))}
    groups = _groups(sites, places, order)
    codes = _codes(str(entry.get("operator")) for entry in sites.values())
    cells = {name: _with_bits(_cell(name, sites[name], codes, groups), bits[name]) for name in order}

    layers: dict[str, int] = defaultdict(int)
    rows: dict[tuple[str, str], dict[int, Cell]] = defaultdict(dict)
    for name, (stack, layer, slot) in places.items():
        if layer >= 0:
            layers[stack] = max(layers[stack], layer + 1)
            rows[stack, slot][layer] = cells[name]
    stack_maps = tuple(
        StackMap(stack, depth, tuple(_row(slot, cells, depth) for (owner, slot), cells in rows.items() if owner == stack))
        for stack, depth in layers.items()
    )
    outside = tuple(cells[name] for name, (_, layer, _) in places.items() if layer < 0)
    return PlanMap(stack_maps, outside, tuple(groups), _operators(cells.values()))


def boundaries(rows: Iterable[Row]) -> tuple[bool, ...]:
    """Whether the plan starts a new group between each cell and the next, along rows that continue one another."""
    return tuple(not _joined(left, right) for left, right in pairwise(cell for row in rows for cell in row.cells))


def _place(name: str, stacks: Mapping[str, Any]) -> tuple[str, int, str]:
    """(stack, layer, slot) of a site by its path; layer −1 outside the stacks."""
    for stack, shape in stacks.items():
        path, layers = dig(shape, "path"), number(dig(shape, "layers")) or 0
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
        for term in _terms(entry):
            for factor in (term.get(key) for key in _FACTORS):
                if factor:
                    users[str(factor)].add(name)
    owner_sets = {tuple(sorted(names, key=order.__getitem__)) for names in users.values() if len(names) > 1}
    groups: list[Group] = []
    in_row: dict[tuple[str, str], Counter[int]] = defaultdict(Counter)
    in_all: Counter[int] = Counter()
    for members in sorted(owner_sets, key=lambda names: (order[names[0]], -len(names))):
        rows = {(places[name][0], places[name][2]) for name in members}
        hue = min(range(HUES), key=lambda hue: (sum(in_row[row][hue] for row in rows), in_all[hue], hue))
        in_all[hue] += 1
        for row in rows:
            in_row[row][hue] += 1
        groups.append(Group(_letters(len(groups)), hue, members))
    return groups


def _letters(index: int) -> str:
    """0 → A, 25 → Z, 26 → AA."""
    head, tail = divmod(index, 26)
    return (_letters(head - 1) if head else "") + chr(ord("A") + tail)


def _cell(name: str, entry: Mapping[str, Any], codes: Mapping[str, str], groups: list[Group]) -> Cell:
    operator, terms = str(entry.get("operator")), _terms(entry)
    own_groups = tuple(sorted((group for group in groups if name in group.sites), key=lambda group: len(group.sites)))
    whole = [_rank(term) for term in terms if not term.get("rows")]
    lanes = _lanes([term for term in terms if term.get("rows")])
    pieces = ["/".join(segment.text for segment in lane if segment.text) for lane in lanes]
    if operator == KEEP:
        kind, rank = KEEP, KEEP
    elif not terms:
        kind, rank = "gone", "–"
    else:
        kind, rank = "shared" if own_groups else "private", "+".join(whole + pieces)
    return Cell(name, operator, codes[operator], rank, kind, number(entry.get("damage")), "+".join(whole), own_groups, lanes)


def _with_bits(cell: Cell, bits: float | None) -> Cell:
    """The cell of a plan that rounds what it keeps."""
    if bits is None or cell.kind != KEEP:
        return cell
    return replace(cell, kind=CODED, operator="rounded", code="bits", rank=f"{bits:.2f}")


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


def _row(slot: str, cell_of: Mapping[int, Cell], depth: int) -> Row:
    cells: list[Cell | None] = [cell_of.get(layer) for layer in range(depth)]
    joined = [_joined(left, right) for left, right in pairwise(cells)]
    for layer, cell in enumerate(cells):
        if cell:
            left, right = layer > 0 and joined[layer - 1], layer < len(joined) and joined[layer]
            cells[layer] = replace(cell, joins_left=left, joins_right=right)
    return Row(slot, tuple(cells))


def _joined(left: Cell | None, right: Cell | None) -> bool:
    return bool(left and right and left.groups and right.groups and left.groups[0] == right.groups[0])


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


def _operators(cells: Iterable[Cell]) -> tuple[OperatorUse, ...]:
    by_operator: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        by_operator[cell.operator].append(cell)
    legend = []
    for name, users in by_operator.items():
        damages = [cell.damage for cell in users if cell.damage is not None]
        legend.append(OperatorUse(name, users[0].code, len(users), sum(damages) if damages else None))
    return tuple(sorted(legend, key=lambda operator: -operator.sites))


def _mapping(data: Any, key: str) -> Mapping[str, Any]:
    value = dig(data, key)
    return value if isinstance(value, Mapping) else {}


def _terms(entry: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    terms = entry.get("terms")
    return [term for term in terms if isinstance(term, Mapping)] if isinstance(terms, list | tuple) else []
