"""Terms: the products of named factors that make up a site's weight, the shapes of the factors, and both as JSON.

A compressed weight is ``Σ_j diag(r_j) · U_j · V_j · diag(c_j)``; two terms that name the same factor share it. ``keep`` has no
terms: the site's module stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from hpr.anatomy.model import Site
from hpr.errors import PlanError
from hpr.plans.layer_states import DROPPED, REUSED

KEEP = "keep"


class FactorShape(NamedTuple):
    """Rows and columns of a factor; a diagonal is (1, n).

    A product U·V equals U·T⁻¹·T·V for every invertible T, so r rows of U (or r columns of V) can be made an exact identity
    block, which need not be stored (as in an interpolative decomposition, Cheng et al. 2005). ``identity`` says on which side
    it is. The other rows (or columns) are stored, and the order of all of them: one integer each, counted like a parameter.
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
class Route:
    """How a term depends on the input: by α(x) = ``experts`` · softmax(R [x; 1]), one number per expert.

    R (experts, in + 1) is the factor ``router``. Without an ``expert``, component c of the term belongs to expert c modulo
    ``experts``, and is multiplied by the α of this expert. With an ``expert``, the α of that expert multiplies the whole term.
    If R is 0, every α is 1, and the term is the same as without a route. ``per`` says what x is: each token, or the mean over
    its sequence. With ``"fixed"``, R has one column, (experts, 1), and α is the same for every input.

    Here the input gives R [x; 1] = (0, ln 3) to two experts. The softmax is (1/4, 3/4), so α is (0.5, 1.5), and a term of
    rank 4 has its components multiplied by 0.5, 1.5, 0.5 and 1.5:

    >>> alpha = 2 * torch.tensor([0.0, math.log(3)]).softmax(-1)
    >>> component_weights(alpha, Route("encoder.3.output.router", experts=2), rank=4)
    tensor([0.5000, 1.5000, 0.5000, 1.5000])
    """

    router: str
    experts: int
    per: Literal["token", "sequence", "fixed"] = "token"
    expert: int | None = None


@dataclass(frozen=True)
class Term:
    """One product of factors. ``u`` (out, rank) and ``v`` (rank, in); with ``v`` None, ``u`` is the whole (out, in) matrix.

    ``row_scale`` (out,) and ``column_scale`` (in,) name diagonals. ``rows`` limits the term to rows [start, stop) of the
    site, so that each segment of a vocabulary can have another rank. ``identity`` says which factor, u or v, has an implicit
    identity block (see ``FactorShape``). ``route``: how the term depends on the input, if it does.

    >>> Term("encoder.3.output:u", "encoder.3.output:v", rank=64).factors
    ('encoder.3.output:u', 'encoder.3.output:v')
    """

    u: str
    v: str | None = None
    rank: int | None = None
    row_scale: str | None = None
    column_scale: str | None = None
    rows: tuple[int, int] | None = None
    identity: Literal["", "u", "v"] = ""
    route: Route | None = None

    @property
    def factors(self) -> tuple[str, ...]:
        """Names of the factors of the product."""
        return tuple(name for name in (self.u, self.v, self.row_scale, self.column_scale) if name is not None)

    def shapes(self, site: Site) -> dict[str, FactorShape]:
        """Factor name → shape, for this term at this site. Raises ``PlanError`` for a term with v that has no rank."""
        start, stop = self.rows or (0, site.out_features)
        shapes: dict[str, FactorShape] = {}
        if self.v is None:
            shapes[self.u] = FactorShape(stop - start, site.in_features)
        else:
            if self.rank is None:
                raise PlanError(f"{site.name}: the term {self.u!r} · {self.v!r} has no rank: give it one")
            shapes[self.u] = FactorShape(stop - start, self.rank, "rows" if self.identity == "u" else "")
            shapes[self.v] = FactorShape(self.rank, site.in_features, "columns" if self.identity == "v" else "")
        if self.row_scale is not None:
            shapes[self.row_scale] = FactorShape(1, stop - start)
        if self.column_scale is not None:
            shapes[self.column_scale] = FactorShape(1, site.in_features)
        if self.route is not None:
            width = 1 if self.route.per == "fixed" else site.in_features + 1
            shapes[self.route.router] = FactorShape(self.route.experts, width)
        return shapes


def factors_of(terms: Iterable[Term]) -> list[str]:
    """Names of all factors that some terms use, in order, each once; routers come last."""
    terms = list(terms)
    return list(dict.fromkeys([*(name for term in terms for name in term.factors), *routers_of(terms)]))


def routers_of(terms: Iterable[Term]) -> list[str]:
    """Names of the routers that some terms use, in order, each once."""
    return list(dict.fromkeys(term.route.router for term in terms if term.route is not None))


@dataclass(frozen=True)
class Entry:
    """What a plan does to one site: the operator's name, the terms, and the predicted damage (nats per example)."""

    operator: str
    terms: tuple[Term, ...] = ()
    damage: float = 0.0


def entry_to_dict(entry: Entry) -> dict[str, Any]:
    """The JSON form of one entry."""
    return {"operator": entry.operator, "damage": entry.damage, "terms": terms_to_list(entry.terms)}


def entry_from_dict(name: str, data: Mapping[str, Any]) -> Entry:
    """The inverse of ``entry_to_dict``; ``name`` is the site's, for messages. Raises as ``terms_from_list``."""
    return Entry(str(data["operator"]), terms_from_list(name, data["terms"]), float(data.get("damage", 0.0)))


def terms_to_list(terms: Iterable[Term]) -> list[dict[str, Any]]:
    """The JSON form of terms; fields that a term does not use are left out.

    >>> terms_to_list([Term("a:u", "a:v", rank=8)])
    [{'u': 'a:u', 'v': 'a:v', 'rank': 8}]
    """
    return [_without_unused(asdict(term)) for term in terms]


def terms_from_list(name: str, data: Iterable[Mapping[str, Any]]) -> tuple[Term, ...]:
    """The inverse of ``terms_to_list``; ``name`` is the site's, for messages.

    Raises ``PlanError`` for an unknown field, ``TypeError`` or ``AttributeError`` for data of another form.
    """
    terms = []
    for raw in data:
        rows, route = raw.get("rows"), raw.get("route")
        for what, kind, given in (("term", Term, raw), ("route", Route, route or {})):
            if unknown := sorted(set(given) - set(kind.__dataclass_fields__)):
                fields = ", ".join(kind.__dataclass_fields__)
                raise PlanError(f"{name}: a {what} has no field {unknown[0]!r}; it has {fields}: remove or rename it")
        read = {"rows": None if rows is None else tuple(rows), "route": None if route is None else Route(**route)}
        terms.append(Term(**{**raw, **read}))
    return tuple(terms)


def _without_unused(values: Mapping[str, Any]) -> dict[str, Any]:
    used = {key: value for key, value in values.items() if value not in (None, "")}
    return used | ({"route": _without_unused(used["route"])} if "route" in used else {})


def validate_entry(site: Site, entry: Entry) -> None:
    """Raise ``PlanError`` if the terms of an entry do not make up the weight of a site."""
    if entry.operator not in (DROPPED, REUSED) and (entry.operator == KEEP) != (not entry.terms):
        raise PlanError(
            f"{site.name}: {KEEP!r} has no terms and every other operator has some; this entry mixes the two: change one"
        )
    if not math.isfinite(entry.damage) or entry.damage < 0:
        raise PlanError(f"{site.name}: damage {entry.damage} is no finite number of nats from 0 up: correct it")
    covered = []
    for term in entry.terms:
        if (term.v is None) != (term.rank is None):
            raise PlanError(
                f"{site.name}: a term has either both v and rank or neither (u is then the whole matrix): add or remove one"
            )
        limit = min(site.out_features, site.in_features)
        if term.rank is not None and not (type(term.rank) is int and 1 <= term.rank <= limit):
            raise PlanError(f"{site.name}: rank {term.rank!r} is not a whole number from 1 to {limit}")
        if term.identity not in ("", "u", "v") or (term.identity and term.rank is None):
            raise PlanError(f"{site.name}: identity {term.identity!r} is neither 'u' nor 'v' of a term with a rank: correct it")
        for factor in (term.u, *term.factors, *routers_of([term])):
            if not (isinstance(factor, str) and factor):
                raise PlanError(f"{site.name}: {factor!r} is no factor name: give a text that is not empty")
        if term.route is not None:
            _validate_route(site, term, term.route)
        if term.rows is not None:
            if len(term.rows) != 2 or not all(isinstance(row, int) for row in term.rows):
                raise PlanError(f"{site.name}: rows {term.rows} are not two whole numbers [start, stop)")
            start, stop = term.rows
            if not 0 <= start < stop <= site.out_features:
                raise PlanError(
                    f"{site.name}: rows {start} to {stop} do not lie within the site's {site.out_features}: correct them"
                )
        if any(min(shape.stored) < 1 for shape in term.shapes(site).values()):
            raise PlanError(
                f"{site.name}: rank {term.rank} leaves nothing beside the identity block of {term.identity!r}: lower it"
            )
        covered.append(term.rows or (0, site.out_features))
    end = 0
    for start, stop in sorted(covered):
        if start > end and entry.operator != REUSED:
            break
        end = max(end, stop)
    if entry.terms and end < site.out_features and entry.operator != REUSED:
        raise PlanError(f"{site.name}: rows {end} and above have no term, so their weights would be lost: cover them")


def _validate_route(site: Site, term: Term, route: Route) -> None:
    if site.kind != "linear" or site.expert is not None:
        raise PlanError(f"{site.name} cannot depend on the input: only Linear modules can; leave its route out")
    if route.per not in ("token", "sequence", "fixed"):
        raise PlanError(f"{site.name}: a route per {route.per!r} is none of 'token', 'sequence' and 'fixed'")
    if not (type(route.experts) is int and route.experts >= 2):
        raise PlanError(f"{site.name}: {route.experts!r} experts are not a whole number from 2 up")
    if route.expert is None and not (term.rank is not None and route.experts <= term.rank):
        raise PlanError(f"{site.name}: {route.experts} experts cannot be dealt rank {term.rank}: use fewer, or name one expert")
    if route.expert is not None and not 0 <= route.expert < route.experts:
        raise PlanError(f"{site.name}: expert {route.expert!r} is not from 0 to {route.experts - 1}: correct it")


def spelled(shape: FactorShape) -> str:
    """For messages: ``384x100 with identity rows``."""
    return f"{shape.rows}x{shape.columns}" + (f" with identity {shape.identity}" if shape.identity else "")
