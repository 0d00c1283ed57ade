"""Finds the sites that may share: the layers of a slot, the experts of a layer, or counterparts in an encoder and its decoder.

Slots of two stacks are *counterparts* if their paths are equal without the numbers in them, their shapes agree, and each has
one such partner only. In T5, ``layer.1.DenseReluDense.wi`` of the encoder is the counterpart of ``layer.2.DenseReluDense.wi``
of the decoder. Cross-attention has no counterpart, so it shares across the layers of the decoder only.
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
        """The row of the sites at some positions, in order. A stack without such a site is left out of the names."""
        names, spans, end = [], [], 0
        for name, (start, stop) in zip(self.names, self.spans, strict=True):
            count = sum(start <= position < stop for position in positions)
            if count:
                names.append(name)
                spans.append((end, end + count))
                end += count
        return SiteRow(tuple(names), tuple(self.sites[position] for position in positions), tuple(spans))

    def adjacent(self, start: int, stop: int) -> bool:
        """Whether no layer or expert is missing between the sites [start, stop).

        The last layer of a lower stack and the first layer of the upper stack are neighbours.
        """
        if stop - start == 1:
            return True
        places = [site.position for site in self.sites[start:stop]]
        if None in places:
            return False
        breaks = {first for first, _ in self.spans}
        steps = zip(range(start + 1, stop), places, places[1:], strict=False)
        return all(index in breaks or after == before + 1 for index, before, after in steps)  # type: ignore[operator]


def rows(model: nn.Module, anatomy: Anatomy, chosen: Set[str]) -> list[SiteRow]:
    """The rows of the chosen sites (by name), one per slot. Counterparts are one row, with the lower stack's layers first.

    The experts of one layer are a row because they read and write the same hidden states, so their weights have directions in
    common. Experts of different layers have only their number in common, so they are in different rows.
    """
    sites_by_key: dict[tuple[Slot, int | None], list[Site]] = {}
    for slot, sites in anatomy.slots().items():
        for site in sites:
            if site.name in chosen:
                sites_by_key.setdefault((slot, None if site.expert is None else site.layer), []).append(site)
    above = {
        lower: sites_by_key.pop((upper, None))
        for lower, upper in counterparts(model, anatomy).items()
        if (lower, None) in sites_by_key and (upper, None) in sites_by_key
    }
    return [_row(sites, above.get(slot, []) if layer is None else []) for (slot, layer), sites in sites_by_key.items()]


def counterparts(model: nn.Module, anatomy: Anatomy) -> dict[Slot, Slot]:
    """(stack, slot) of a lower stack → its counterpart in the stack that reads it. Empty if the model is no encoder–decoder."""
    alike: dict[str, dict[Signature, list[Slot]]] = defaultdict(lambda: defaultdict(list))
    for slot, sites in anatomy.slots().items():
        first = sites[0]
        if first.stack is not None and first.kind == "linear" and first.expert is None:
            path = ".".join(part for part in first.slot.split(".") if not part.isdigit())
            alike[first.stack][path, first.out_features, first.in_features].append(slot)
    declared = getattr(getattr(model, "config", None), "is_encoder_decoder", None)
    slot_pairs: dict[Slot, Slot] = {}
    joined: set[str] = set()
    for lower, upper in combinations([stack.name for stack in anatomy.stacks], 2):
        if not joined & {lower, upper} and _reads(alike[lower], alike[upper], declared):
            joined |= {lower, upper}
            common = [signature for signature in alike[lower] if signature in alike[upper]]
            pairs = [(alike[lower][signature], alike[upper][signature]) for signature in common]
            slot_pairs |= {below[0]: above[0] for below, above in pairs if len(below) == len(above) == 1}
    return slot_pairs


def _reads(lower: Mapping[Signature, list], upper: Mapping[Signature, list], declared: bool | None) -> bool:
    """Whether the upper stack reads the lower one: it has the same kinds of slots, and further ones for cross-attention.

    Two towers (CLIP) have the same slots, or none in common. ``declared``: ``is_encoder_decoder`` of the configuration, None
    if the configuration lacks it. If it is True, the encoder may have slots that the decoder lacks.
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
