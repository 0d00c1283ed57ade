"""Which sites stand on one track: the layers of a slot, the experts of a layer, or kin slots of an encoder and its decoder.

Slots of two stacks are *kin* where their paths are alike once the numbers in them are left out, their shapes agree, and each
has but one such partner: T5's ``layer.1.DenseReluDense.wi`` below is ``layer.2.DenseReluDense.wi`` above. Cross-attention has
no kin, so it shares with itself across layers only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Set
from dataclasses import dataclass
from itertools import combinations

from torch import nn

from hpr.anatomy.model import Anatomy, Site

Slot = tuple[str, str]  # stack, slot
Likeness = tuple[str, int, int]  # what two kin slots have in common: path without numbers, out, in


@dataclass(frozen=True)
class Row:
    """Sites that may share, in order; ``spans`` are the runs [start, stop) that belong to one stack each."""

    name: str
    sites: tuple[Site, ...]
    spans: tuple[tuple[int, int], ...]

    def adjacent(self, start: int, stop: int) -> bool:
        """Whether no layer (or expert) is left out between these sites; a stack's last neighbours the next one's first."""
        if stop - start == 1:
            return True
        places = [site.position for site in self.sites[start:stop]]
        if None in places:
            return False
        breaks = {first for first, _ in self.spans}
        steps = zip(range(start + 1, stop), places, places[1:], strict=False)
        return all(index in breaks or after == before + 1 for index, before, after in steps)  # type: ignore[operator]


def rows(model: nn.Module, anatomy: Anatomy, chosen: Set[str]) -> list[Row]:
    """The chosen sites (by name) of every slot as rows, kin slots as one row, the lower stack's layers first.

    The experts of a layer read the same stream and write to the same, so they have directions in common and are a row.
    Expert 3 of one layer and expert 3 of the next have nothing in common but a number.
    """
    found: dict[tuple[Slot, int | None], list[Site]] = {}
    for slot, sites in anatomy.slots().items():
        for site in sites:
            if site.name in chosen:
                found.setdefault((slot, None if site.expert is None else site.layer), []).append(site)
    above = {
        lower: found.pop((upper, None))
        for lower, upper in kin(model, anatomy).items()
        if (lower, None) in found and (upper, None) in found
    }
    return [_row(sites, above.get(slot, []) if layer is None else []) for (slot, layer), sites in found.items()]


def kin(model: nn.Module, anatomy: Anatomy) -> dict[Slot, Slot]:
    """(stack, slot) of a lower stack → its kin in the stack above that reads it; empty for all but encoder–decoders."""
    alike: dict[str, dict[Likeness, list[Slot]]] = defaultdict(lambda: defaultdict(list))
    for slot, sites in anatomy.slots().items():
        first = sites[0]
        if first.stack is not None and first.kind == "linear" and first.expert is None:
            path = ".".join(part for part in first.slot.split(".") if not part.isdigit())
            alike[first.stack][path, first.out_features, first.in_features].append(slot)
    declared = getattr(getattr(model, "config", None), "is_encoder_decoder", None)
    found: dict[Slot, Slot] = {}
    joined: set[str] = set()
    for lower, upper in combinations([stack.name for stack in anatomy.stacks], 2):
        if not joined & {lower, upper} and _reads(alike[lower], alike[upper], declared):
            joined |= {lower, upper}
            common = [likeness for likeness in alike[lower] if likeness in alike[upper]]
            pairs = [(alike[lower][likeness], alike[upper][likeness]) for likeness in common]
            found |= {below[0]: above[0] for below, above in pairs if len(below) == len(above) == 1}
    return found


def _reads(lower: Mapping[Likeness, list], upper: Mapping[Likeness, list], declared: bool | None) -> bool:
    """Whether one stack reads another: it has slots of the same kinds, and cross-attention beside them.

    Two towers (CLIP) have the same slots, or none in common. ``declared``: what the configuration says, None without one;
    an encoder that is declared may also have slots of its own.
    """
    common, beside = lower.keys() & upper.keys(), upper.keys() - lower.keys()
    return declared is not False and bool(common and beside) and (bool(declared) or lower.keys() <= upper.keys())


def _row(sites: list[Site], above: list[Site]) -> Row:
    spans = [(0, len(sites))]
    name = _name(sites[0])
    if above:
        spans.append((len(sites), len(sites) + len(above)))
        name = f"{name} + {_name(above[0])}"
    return Row(name, (*sites, *above), tuple(spans))


def _name(first: Site) -> str:
    if first.expert is not None:
        return first.name.rpartition(".")[0]
    return f"{first.stack} · {first.slot}" if first.stack else first.name
