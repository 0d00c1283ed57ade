"""What becomes of a site: its terms, products of factors by name, and the shapes that factors have.

A compressed weight is ``Σ_j diag(r_j) · U_j · V_j · diag(c_j)``; two terms that name the same factor share it. ``keep`` has no
terms: the site's own module stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from hpr.anatomy import Site
from hpr.errors import HprError
from hpr.planning.layers import DROPPED, REUSED

KEEP = "keep"


class FactorShape(NamedTuple):
    """Rows and columns of a factor; a diagonal is (1, n).

    A product U·V is unchanged by U·T⁻¹·T·V, so r rows of U (or r columns of V) can be made an exact identity block that
    need not be stored (as in an interpolative decomposition, Cheng et al. 2005): ``identity`` says on which side. What is
    stored then is the rest and the order of the rows (or columns), one integer each, counted like a parameter.
    """

    rows: int
    columns: int
    identity: Literal["", "rows", "columns"] = ""

    @property
    def stored(self) -> tuple[int, int]:
        """Shape of the matrix that is stored."""
        if self.identity == "rows":
            return self.rows - self.columns, self.columns
        if self.identity == "columns":
            return self.rows, self.columns - self.rows
        return self.rows, self.columns

    @property
    def parameters(self) -> int:
        order = {"": 0, "rows": self.rows, "columns": self.columns}[self.identity]
        return math.prod(self.stored) + order


@dataclass(frozen=True)
class Term:
    """One product of factors. ``u`` (out, rank) and ``v`` (rank, in); with ``v`` None, ``u`` is the whole (out, in) matrix.

    ``row_scale`` (out,) and ``column_scale`` (in,) name diagonals. ``rows`` limits the term to rows [start, stop) of the
    site, so that the segments of a vocabulary may have ranks of their own. ``identity`` names the factor that holds an
    implicit identity block (see ``FactorShape``).
    """

    u: str
    v: str | None = None
    rank: int | None = None
    row_scale: str | None = None
    column_scale: str | None = None
    rows: tuple[int, int] | None = None
    identity: Literal["", "u", "v"] = ""

    @property
    def factors(self) -> tuple[str, ...]:
        """Names of the factors it uses."""
        return tuple(name for name in (self.u, self.v, self.row_scale, self.column_scale) if name is not None)

    def shapes(self, site: Site) -> dict[str, FactorShape]:
        """Factor name → shape, for this term at this site."""
        start, stop = self.rows or (0, site.out_features)
        shapes: dict[str, FactorShape] = {}
        if self.v is None:
            shapes[self.u] = FactorShape(stop - start, site.in_features)
        else:
            assert self.rank is not None
            shapes[self.u] = FactorShape(stop - start, self.rank, "rows" if self.identity == "u" else "")
            shapes[self.v] = FactorShape(self.rank, site.in_features, "columns" if self.identity == "v" else "")
        if self.row_scale is not None:
            shapes[self.row_scale] = FactorShape(1, stop - start)
        if self.column_scale is not None:
            shapes[self.column_scale] = FactorShape(1, site.in_features)
        return shapes


@dataclass(frozen=True)
class Entry:
    """What becomes of one site: the operator's name, its terms, and the damage predicted for it (nats per example)."""

    operator: str
    terms: tuple[Term, ...] = ()
    damage: float = 0.0


def entry_to_dict(entry: Entry) -> dict[str, Any]:
    """The JSON form of one entry; what a term does not use is left out."""
    terms = [{key: value for key, value in asdict(term).items() if value not in (None, "")} for term in entry.terms]
    return {"operator": entry.operator, "damage": entry.damage, "terms": terms}


def entry_from_dict(name: str, data: Mapping[str, Any]) -> Entry:
    """The inverse of ``entry_to_dict``; ``name`` is the site's, for messages. Raises ``HprError`` for unknown fields."""
    terms = []
    for raw in data["terms"]:
        unknown = set(raw) - set(Term.__dataclass_fields__)
        if unknown:
            raise HprError(f"{name}: a term has no field {sorted(unknown)[0]!r}; it has {', '.join(Term.__dataclass_fields__)}")
        rows = raw.get("rows")
        terms.append(Term(**{**raw, "rows": tuple(rows) if rows is not None else None}))
    return Entry(str(data["operator"]), tuple(terms), float(data.get("damage", 0.0)))


def validate_entry(site: Site, entry: Entry) -> None:
    """Raise ``HprError`` where terms do not make up the weight of a site."""
    if entry.operator not in (DROPPED, REUSED) and (entry.operator == KEEP) != (not entry.terms):
        raise HprError(f"{site.name}: {KEEP!r} has no terms and every other operator has some; this entry mixes the two")
    if not math.isfinite(entry.damage) or entry.damage < 0:
        raise HprError(f"{site.name}: damage {entry.damage} is no finite number of nats from 0 up")
    covered = []
    for term in entry.terms:
        if (term.v is None) != (term.rank is None):
            raise HprError(f"{site.name}: a term has either both v and rank or neither (u is then the whole matrix)")
        limit = min(site.out_features, site.in_features)
        if term.rank is not None and not (type(term.rank) is int and 1 <= term.rank <= limit):
            raise HprError(f"{site.name}: rank {term.rank!r} is not a whole number from 1 to {limit}")
        if term.identity not in ("", "u", "v") or (term.identity and term.rank is None):
            raise HprError(f"{site.name}: identity {term.identity!r} is neither 'u' nor 'v' of a term with a rank")
        for factor in term.factors:
            if not (isinstance(factor, str) and factor):
                raise HprError(f"{site.name}: {factor!r} is no factor name")
        if term.rows is not None:
            if len(term.rows) != 2 or not all(isinstance(row, int) for row in term.rows):
                raise HprError(f"{site.name}: rows {term.rows} are not two whole numbers [start, stop)")
            start, stop = term.rows
            if not 0 <= start < stop <= site.out_features:
                raise HprError(f"{site.name}: rows {start} to {stop} do not lie within the site's {site.out_features}")
        if any(min(shape.stored) < 1 for shape in term.shapes(site).values()):
            raise HprError(
                f"{site.name}: rank {term.rank} leaves nothing beside the identity block of {term.identity!r}: lower it"
            )
        covered.append(term.rows or (0, site.out_features))
    end = 0
    for start, stop in sorted(covered):
        if start > end and entry.operator != REUSED:
            break
        end = max(end, stop)
    if entry.terms and end < site.out_features and entry.operator != REUSED:
        raise HprError(f"{site.name}: rows {end} and above have no term, so their weights would be lost: cover them")


def spelled(shape: FactorShape) -> str:
    """For messages: ``384x100 with identity rows``."""
    return f"{shape.rows}x{shape.columns}" + (f" with identity {shape.identity}" if shape.identity else "")
