"""Which sites may share: the layers of a slot, the experts of a layer, or counterparts in an encoder and its decoder.

Slots of two stacks are *counterparts* if their paths are equal without the numbers in them, their shapes agree, and each has
one such partner only: T5's ``layer.1.DenseReluDense.wi`` below is ``layer.2.DenseReluDense.wi`` above. Cross-attention has no
counterpart, so it shares with itself across layers only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from itertools import combinations

from torch import nn

from hpr.anatomy.model import Anatomy, Site

Slot = tuple[str, str]  # stack, slot
Signature = tuple[str, int, int]  # what two counterparts have in common: path without numbers, out, in


@dataclass(frozen=True)
class SiteRow:
    """Sites that may share, in order. ``spans``: the runs [start, stop) that belong to one stack each, with their ``names``."""

    names: tuple[str, ...]
    sites: tuple[Site, ...]
    spans: tuple[tuple[int, int], ...]

    @property
    def name(self) -> str:
        """The names of all spans: ``encoder · fc1 + decoder · fc1``."""
        return " + ".join(self.names)

    def narrowed(self, positions: Sequence[int]) -> SiteRow:
        """The sites at some positions, in order; a stack without any of them drops out of the name."""
        names, spans, end = [], [], 0
        for name, (start, stop) in zip(self.names, self.spans, strict=True):
            count = sum(start <= position < stop for position in positions)
            if count:
                names.append(name)
                spans.append((end, end + count))
                end += count
        return SiteRow(tuple(names), tuple(self.sites[position] for position in positions), tuple(spans))

    def adjacent(self, start: int, stop: int) -> bool:
        """Whether no layer or expert is missing between these sites. The last layer of a stack is next to the first above."""
        if stop - start == 1:
            return True
        places = [site.position for site in self.sites[start:stop]]
        if None in places:
            return False
        breaks = {first for first, _ in self.spans}
        steps = zip(range(start + 1, stop), places, places[1:], strict=False)
        return all(index in breaks or after == before + 1 for index, before, after in steps)  # type: ignore[operator]


def rows(model: nn.Module, anatomy: Anatomy, chosen: Set[str]) -> list[SiteRow]:
    """The chosen sites (by name) of every slot as rows. Counterparts are one row, the lower stack's layers first.

    The experts of one layer are a row because they read and write the same stream, so their weights have directions in common.
    Experts of different layers that have the same number have nothing else in common.
    """
    found: dict[tuple[Slot, int | None], list[Site]] = {}
    for slot, sites in anatomy.slots().items():
        for site in sites:
            if site.name in chosen:
                found.setdefault((slot, None if site.expert is None else site.layer), []).append(site)
    above = {
        lower: found.pop((upper, None))
        for lower, upper in counterparts(model, anatomy).items()
        if (lower, None) in found and (upper, None) in found
    }
    return [_row(sites, above.get(slot, []) if layer is None else []) for (slot, layer), sites in found.items()]


def counterparts(model: nn.Module, anatomy: Anatomy) -> dict[Slot, Slot]:
    """(stack, slot) of a lower stack → its counterpart in the stack that reads it; empty for all but encoder–decoders."""
    alike: dict[str, dict[Signature, list[Slot]]] = defaultdict(lambda: defaultdict(list))
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
            common = [signature for signature in alike[lower] if signature in alike[upper]]
            pairs = [(alike[lower][signature], alike[upper][signature]) for signature in common]
            found |= {below[0]: above[0] for below, above in pairs if len(below) == len(above) == 1}
    return found


def _reads(lower: Mapping[Signature, list], upper: Mapping[Signature, list], declared: bool | None) -> bool:
    """Whether one stack reads another: it has the same kinds of slots and more, its cross-attention.

    Two towers (CLIP) have the same slots, or none in common. ``declared``: ``is_encoder_decoder`` of the configuration, None
    if there is none; if it is True, the encoder may have slots that the decoder lacks.
    """
    common, beside = lower.keys() & upper.keys(), upper.keys() - lower.keys()
    return declared is not False and bool(common and beside) and (bool(declared) or lower.keys() <= upper.keys())


def _row(sites: list[Site], above: list[Site]) -> SiteRow:
    spans = [(0, len(sites))]
    names = [_name(sites[0])]
    if above:
        spans.append((len(sites), len(sites) + len(above)))
        names.append(_name(above[0]))
    return SiteRow(tuple(names), (*sites, *above), tuple(spans))


def _name(first: Site) -> str:
    if first.expert is not None:
        return first.name.rpartition(".")[0]
    return f"{first.stack} · {first.slot}" if first.stack else first.name
