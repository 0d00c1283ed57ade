"""The plan: one entry per site with a list of terms, saved as JSON that a person can read, edit and diff."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from hpr.anatomy.model import Anatomy, Stack
from hpr.anatomy.symmetry import AlignTarget, layers_of
from hpr.errors import HprError, PlanError, check_kind
from hpr.plans.budget import Budget
from hpr.plans.layer_states import check_entries, check_states
from hpr.plans.owners import owners
from hpr.plans.rounding import Rounding
from hpr.plans.terms import KEEP, Entry, FactorShape, entry_from_dict, entry_to_dict, spelled, validate_entry
from hpr.plans.text_table import plan_text
from hpr.runtime.files import parse_json, write_text

FORMAT = 2


@dataclass(frozen=True)
class Plan:
    """One entry per site of a model, under a budget. ``diagnostics`` holds the solver's notes (JSON values).

    ``entries``: site name → entry; ``dense_parameters`` and ``other_parameters`` count the unique parameters of the original
    model, all of them and those outside the sites. ``layers``: name (``encoder.3``) → state of each layer that is dropped or
    reuses attention (see ``plans.layer_states``); ``removed``: path → number of parameters outside the sites that such layers
    no longer need.

    ``rounding``: how the weights are rounded and coded, for a budget in bytes; None leaves them in their precision.

    ``stacks``: those of the model, for reports that are made from the plan alone.

    With an ``alignment`` the model's layers are transformed before they share, and the entries describe the transformed
    weights. The transforms follow from the original weights, the profile and these targets.

    >>> plan = hpr.plan(model, profile, budget="60%")
    >>> plan.entries["encoder.layer.1.output.dense"].operator
    'shared input basis'
    >>> plan.parameters(hpr.describe(model)) <= plan.budget.parameters
    True
    >>> plan.save(folder / "plan.json")
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
    alignment: tuple[AlignTarget, ...] = ()
    stacks: tuple[Stack, ...] = ()
    rounding: Rounding | None = None

    @property
    def damage(self) -> float:
        """Predicted divergence from the original in nats per example: the sum over sites."""
        return sum(entry.damage for entry in self.entries.values())

    def factors(self, anatomy: Anatomy) -> dict[str, FactorShape]:
        """Factor name → shape. Raises ``PlanError`` if two sites need different shapes of one factor."""
        shapes: dict[str, FactorShape] = {}
        for name, entry in self.entries.items():
            for term in entry.terms:
                for factor, shape in term.shapes(anatomy[name]).items():
                    if shapes.setdefault(factor, shape) != shape:
                        raise PlanError(
                            f"factor {factor!r} is {spelled(shapes[factor])} at one site and {spelled(shape)} at {name}: "
                            f"sites that share a factor need the same rank and size: make them agree"
                        )
        return shapes

    def parameters(self, anatomy: Anatomy) -> int:
        """Unique parameters of the compressed model: those outside the sites, kept weights and every factor once."""
        kept = sum(anatomy[name].parameters for name, entry in self.entries.items() if entry.operator == KEEP)
        other = self.other_parameters - sum(self.removed.values())
        return other + kept + sum(shape.parameters for shape in self.factors(anatomy).values())

    def groups(self) -> dict[tuple[str, ...], list[str]]:
        """Names of sites that share factors → names of these factors."""
        shared: dict[tuple[str, ...], list[str]] = {}
        for factor, sites in owners({name: entry.terms for name, entry in self.entries.items()}).items():
            if len(sites) > 1:
                shared.setdefault(tuple(sites), []).append(factor)
        return shared

    def validate(self, anatomy: Anatomy) -> None:
        """Check the plan against a model before the model changes. Raises ``PlanError`` for the first fault."""
        if self.fingerprint != anatomy.fingerprint:
            raise PlanError(
                f"the plan was made for a {self.model_class} with fingerprint {self.fingerprint}, this is a "
                f"{anatomy.model_class} with {anatomy.fingerprint}: plan this model anew, or load the one it was made for"
            )
        counts = ("dense_parameters", self.dense_parameters, anatomy.total_parameters)
        others = ("other_parameters", self.other_parameters, anatomy.other_parameters)
        for key, count, found in (counts, others):
            if count != found:
                raise PlanError(f"the plan says {key} {count:,}, this model has {found:,}: correct it, or plan anew")
        names = {site.name for site in anatomy.sites}
        if missing := sorted(names - set(self.entries)):
            raise PlanError(f"the plan has no entry for {missing[0]} ({len(missing)} missing): add one, {KEEP!r} if in doubt")
        if unknown := sorted(set(self.entries) - names):
            raise PlanError(f"the plan names {unknown[0]}, which this model does not have: remove it or correct the name")
        check_states(self.layers, {stack.name: stack.layers for stack in anatomy.stacks})
        operators = {name: (entry.operator, bool(entry.terms)) for name, entry in self.entries.items()}
        check_entries(anatomy, self.layers, self.removed, operators)
        for name, entry in self.entries.items():
            validate_entry(anatomy[name], entry)
        for target in self.alignment:
            _validate_target(anatomy, target)
        used = self.parameters(anatomy)
        if used > self.budget.parameters:
            raise PlanError(
                f"the plan needs {used:,} parameters, its budget {self.budget.text} allows {self.budget.parameters:,}: "
                f"lower some ranks or raise the budget"
            )

    def __str__(self) -> str:
        """The table that ``hpr plan`` prints, as plain text."""
        return plan_text(self.to_dict())

    def __repr__(self) -> str:
        return f"Plan({self.model_class}, {len(self.entries)} sites, budget {self.budget.text}, damage {self.damage:.3g} nats)"

    def _repr_html_(self) -> str:
        """The table, for notebooks."""
        return f"<pre>{escape(str(self))}</pre>"

    def to_dict(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "model": {
                "class": self.model_class,
                "fingerprint": self.fingerprint,
                "dense_parameters": self.dense_parameters,
                "other_parameters": self.other_parameters,
            },
            "stacks": {stack.name: {"path": stack.path, "layers": stack.layers} for stack in self.stacks},
            "budget": asdict(self.budget),
            "predicted_damage": self.damage,
            **({"layers": dict(self.layers), "removed": dict(self.removed)} if self.layers else {}),
            **({"rounding": asdict(self.rounding)} if self.rounding else {}),
            **({"alignment": [target.to_list() for target in self.alignment]} if self.alignment else {}),
            "sites": {name: entry_to_dict(entry) for name, entry in self.entries.items()},
            "diagnostics": dict(self.diagnostics),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """The inverse of ``to_dict``. Raises ``PlanError`` naming the key that is missing or of the wrong kind."""
        if not isinstance(data, Mapping):
            raise PlanError(f"not a plan, but a {type(data).__name__}: give what `hpr plan` wrote")
        if data.get("format") != FORMAT:
            raise PlanError(f"plan format {data.get('format')!r} is not the {FORMAT} that this version reads: plan anew")
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
                alignment=tuple(AlignTarget.from_list(values) for values in data.get("alignment", ())),
                rounding=Rounding(**data["rounding"]) if data.get("rounding") else None,
                stacks=tuple(Stack(name, str(of["path"]), int(of["layers"])) for name, of in data["stacks"].items()),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, HprError):
                raise
            raise PlanError(
                f"not a plan: {type(error).__name__} at {error}: compare it with a plan that `hpr plan` wrote"
            ) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, atomically."""
        write_text(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Plan:
        """Read a plan that ``save`` wrote. Raises ``PlanError`` for a file that is missing or is not a plan."""
        check_kind("the path of a plan", path, (str, os.PathLike), "a path")
        try:
            return cls.from_dict(parse_json(Path(path).read_text(encoding="utf-8")))
        except FileNotFoundError as error:
            raise PlanError(f"no plan at {path}: write one with `hpr plan`") from error
        except IsADirectoryError as error:
            raise PlanError(f"{path} is a folder: give the plan.json in it") from error
        except HprError:
            raise
        except ValueError as error:
            raise PlanError(f"{path} is not JSON ({error}): undo the edit or plan anew") from error


def is_plan(path: Path) -> bool:
    """Whether a file is a plan, of this version or another."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and {"format", "budget", "sites"} <= content.keys()


def keep_all(anatomy: Anatomy) -> Plan:
    """The identity plan: every site is kept, so the student's outputs equal the teacher's bit for bit."""
    return Plan(
        model_class=anatomy.model_class,
        fingerprint=anatomy.fingerprint,
        budget=Budget("100%", anatomy.total_parameters),
        dense_parameters=anatomy.total_parameters,
        other_parameters=anatomy.other_parameters,
        entries={site.name: Entry(KEEP) for site in anatomy.sites},
        stacks=anatomy.stacks,
    )


def _validate_target(anatomy: Anatomy, target: AlignTarget) -> None:
    layers = layers_of(anatomy, target.symmetry)
    for axis_slice in target.symmetry.slices:
        sizes = [
            site.out_features if axis_slice.side == "rows" else site.in_features
            for sites in layers.values()
            for site in [sites[axis_slice.slot]]
        ]
        if not sizes or not 0 <= axis_slice.start < axis_slice.stop <= min(sizes):
            raise PlanError(
                f"the plan's alignment transforms {axis_slice.side} {axis_slice.start} to {axis_slice.stop} of "
                f"{axis_slice.slot!r} in {target.symmetry.stack!r}, which this model does not have: correct it, or plan anew"
            )
