"""The plan: one entry per site, a list of terms each, saved as JSON that a person can read, edit and diff.

A compressed weight is ``Σ_j diag(r_j) · U_j · V_j · diag(c_j)``; a term names the factors it uses, and two terms that name
the same factor share it. ``keep`` has no terms: the site's own module stays as it is.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from hpr.anatomy import Anatomy, Site
from hpr.errors import HprError
from hpr.folders import write_text
from hpr.planning.budget import Budget
from hpr.planning.layers import DROPPED, REUSED, check_entries, check_states
from hpr.symmetries import Aim, layers_of

FORMAT = 1
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


@dataclass(frozen=True)
class Plan:
    """One entry per site of a model, under a budget. ``diagnostics`` holds what the solver has to say (JSON values).

    ``layers``: layer name (``encoder.3``) → its state, where it does not compute all by itself (see ``planning.layers``);
    ``removed``: how many parameters besides the weights of sites go with such layers (see ``vanishing.Vanishing``).

    With an ``alignment`` the model's layers are turned before they share: the entries are of the turned weights. The turns
    follow from the original weights, the profile and these aims.
    """

    model_class: str
    fingerprint: str
    budget: Budget
    dense_parameters: int
    other_parameters: int
    entries: Mapping[str, Entry]
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    layers: Mapping[str, str] = field(default_factory=dict)
    removed: Mapping[str, int] = field(default_factory=dict)
    alignment: tuple[Aim, ...] = ()

    @property
    def damage(self) -> float:
        """Predicted divergence from the original in nats per example: the sum over sites."""
        return sum(entry.damage for entry in self.entries.values())

    def factors(self, anatomy: Anatomy) -> dict[str, FactorShape]:
        """Factor name → shape. Raises ``HprError`` where two users of a factor disagree on its shape."""
        shapes: dict[str, FactorShape] = {}
        for name, entry in self.entries.items():
            for term in entry.terms:
                for factor, shape in term.shapes(anatomy[name]).items():
                    if shapes.setdefault(factor, shape) != shape:
                        raise HprError(
                            f"factor {factor!r} is {_spell(shapes[factor])} at one site and {_spell(shape)} at {name}: "
                            f"sites that share a factor need the same rank and size; make them agree"
                        )
        return shapes

    def parameters(self, anatomy: Anatomy) -> int:
        """Unique parameters of the compressed model: private ones, kept weights and every factor once."""
        kept = sum(anatomy[name].parameters for name, entry in self.entries.items() if entry.operator == KEEP)
        other = self.other_parameters - sum(self.removed.values())
        return other + kept + sum(shape.parameters for shape in self.factors(anatomy).values())

    def groups(self) -> dict[tuple[str, ...], list[str]]:
        """Sites that share at least one factor, as site names → the factors they share."""
        owners: dict[str, list[str]] = {}
        for name, entry in self.entries.items():
            for term in entry.terms:
                for factor in term.factors:
                    if name not in owners.setdefault(factor, []):
                        owners[factor].append(name)
        shared: dict[tuple[str, ...], list[str]] = {}
        for factor, sites in owners.items():
            if len(sites) > 1:
                shared.setdefault(tuple(sites), []).append(factor)
        return shared

    def validate(self, anatomy: Anatomy) -> None:
        """Check everything before a model is touched. Raises ``HprError`` naming the value, the limit and the mend."""
        if self.fingerprint != anatomy.fingerprint:
            raise HprError(
                f"the plan was made for a {self.model_class} with fingerprint {self.fingerprint}, this is a "
                f"{anatomy.model_class} with {anatomy.fingerprint}: plan this model anew, or load the one planned for"
            )
        names = {site.name for site in anatomy.sites}
        if missing := sorted(names - set(self.entries)):
            raise HprError(f"the plan has no entry for {missing[0]} ({len(missing)} missing): add one, {KEEP!r} if in doubt")
        if unknown := sorted(set(self.entries) - names):
            raise HprError(f"the plan names {unknown[0]}, which this model does not have: remove it or correct the name")
        check_states(self.layers, {stack.name: stack.layers for stack in anatomy.stacks})
        operators = {name: (entry.operator, bool(entry.terms)) for name, entry in self.entries.items()}
        check_entries(anatomy, self.layers, self.removed, operators)
        for name, entry in self.entries.items():
            _validate_entry(anatomy[name], entry)
        for aim in self.alignment:
            _validate_aim(anatomy, aim)
        used = self.parameters(anatomy)
        if used > self.budget.parameters:
            raise HprError(
                f"the plan needs {used:,} parameters, its budget {self.budget.text} allows {self.budget.parameters:,}: "
                f"lower some ranks or raise the budget"
            )

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "model": {
                "class": self.model_class,
                "fingerprint": self.fingerprint,
                "dense_parameters": self.dense_parameters,
                "other_parameters": self.other_parameters,
            },
            "budget": asdict(self.budget),
            "predicted_damage": self.damage,
            **({"layers": dict(self.layers), "removed": dict(self.removed)} if self.layers else {}),
            **({"alignment": [aim.to_list() for aim in self.alignment]} if self.alignment else {}),
            "sites": {name: entry_to_dict(entry) for name, entry in self.entries.items()},
            "diagnostics": dict(self.diagnostics),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The inverse of ``to_dict``. Raises ``HprError`` naming the key that is missing or of the wrong kind."""
        if data.get("format") != FORMAT:
            raise HprError(f"plan format {data.get('format')!r} is not the {FORMAT} this version reads: plan anew")
        try:
            model = data["model"]
            return cls(
                model_class=model["class"],
                fingerprint=model["fingerprint"],
                budget=Budget(str(data["budget"]["text"]), int(data["budget"]["parameters"])),
                dense_parameters=int(model["dense_parameters"]),
                other_parameters=int(model["other_parameters"]),
                entries={name: entry_from_dict(name, entry) for name, entry in data["sites"].items()},
                diagnostics=data.get("diagnostics", {}),
                layers=dict(data.get("layers", {})),
                removed=dict(data.get("removed", {})),
                alignment=tuple(Aim.from_list(values) for values in data.get("alignment", ())),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, HprError):
                raise
            raise HprError(
                f"not a plan: {type(error).__name__} at {error}; compare with a plan written by `hpr plan`"
            ) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON atomically."""
        write_text(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        try:
            return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise HprError(f"no plan at {path}: `hpr plan` writes one") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise HprError(f"{path} is not JSON ({error}): undo the edit or plan anew") from error


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


def keep_all(anatomy: Anatomy) -> Plan:
    """The identity plan: every site kept, so the student's outputs equal the teacher's bit for bit."""
    return Plan(
        model_class=anatomy.model_class,
        fingerprint=anatomy.fingerprint,
        budget=Budget("100%", anatomy.total_parameters),
        dense_parameters=anatomy.total_parameters,
        other_parameters=anatomy.other_parameters,
        entries={site.name: Entry(KEEP) for site in anatomy.sites},
    )


def _validate_entry(site: Site, entry: Entry) -> None:
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


def _validate_aim(anatomy: Anatomy, aim: Aim) -> None:
    layers = layers_of(anatomy, aim.symmetry)
    for stretch in aim.symmetry.stretches:
        sizes = [
            site.out_features if stretch.side == "rows" else site.in_features
            for sites in layers.values()
            for site in [sites[stretch.slot]]
        ]
        if not sizes or not 0 <= stretch.start < stretch.stop <= min(sizes):
            raise HprError(
                f"the plan's alignment turns {stretch.side} {stretch.start} to {stretch.stop} of {stretch.slot!r} in "
                f"{aim.symmetry.stack!r}, which this model does not have: correct it, or plan anew"
            )


def _spell(shape: FactorShape) -> str:
    return f"{shape.rows}x{shape.columns}" + (f" with identity {shape.identity}" if shape.identity else "")
