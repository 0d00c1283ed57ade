"""A model made hierarchical by rule, without a profile, in the manner of ``from_pretrained``."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from hpr import hub
from hpr.anatomy import Anatomy, Site, describe, module_at, weight_at
from hpr.bank import factors_of
from hpr.models import OpenModel, open_model
from hpr.operators import Fitted, tie
from hpr.planning.budget import Budget
from hpr.planning.layers import DROPPED, REUSED, WEIGHTS, site_layer
from hpr.planning.plan import Plan, keep_all
from hpr.planning.terms import KEEP, Entry, Term
from hpr.profiling.objectives import Batch, objective_for
from hpr.replaceable import unshareable
from hpr.reuse import paths_of
from hpr.rules import Replication, Rules, replication
from hpr.sharing import share
from hpr.vanishing import vanishing, with_layers

_log = logging.getLogger(__name__)


class HierarchicalModel(nn.Module):
    """A pretrained model whose layers reuse what the layers below have, as rules say (see ``hpr.rules.replication``).

    ``base_model``: a folder, a hub id or a module, which stays untouched; None is the packaged all-MiniLM-L6-v2. After that the
    attribute ``base_model`` is the model with reuse, of the same class; calls, ``config`` and ``save_pretrained`` go there, and
    what is saved loads with ``AutoModel`` after ``import hpr``. ``replication`` says what the rules came to, and notes those
    without effect, which are logged as warnings too. ``batch`` is data for models whose inputs are unusual. Raises
    ``HprError`` for rules that mean nothing, and for layers that cannot do what they say.
    """

    default_base: ClassVar[str | None] = None
    default_rules: ClassVar[Rules] = {}

    def __init__(
        self,
        base_model: str | os.PathLike[str] | nn.Module | None = None,
        replication_rules: Rules | None = None,
        batch: Batch | None = None,
    ):
        super().__init__()
        opened = _opened(self.default_base if base_model is None else base_model)
        self.replication_rules = self.default_rules if replication_rules is None else replication_rules
        rules = ByRule(self.replication_rules, batch)
        self.replication = rules.read(opened.model)
        self.base_model = share(opened.model, rules)
        copy_below(self.base_model, describe(opened.model), self.replication)
        self._opened = (opened.tokenizer, opened.folder)
        for note in self.replication.notes:
            _log.warning("%s", note)

    @classmethod
    def from_pretrained(
        cls,
        base: str | os.PathLike[str] | nn.Module | None = None,
        replication_rules: Rules | None = None,
        batch: Batch | None = None,
    ) -> HierarchicalModel:
        """The same as the constructor, by the name that transformers has taught."""
        return cls(base, replication_rules, batch)

    @property
    def config(self) -> Any:
        return self.base_model.config

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.base_model(*inputs, **named)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write model and tokenizer into a folder, at once; returns it. Raises ``HprError`` for a folder of someone else."""
        tokenizer, source = self._opened
        return hub.save(self.base_model, folder, tokenizer, source=source)


class HierarchicalBert(HierarchicalModel):
    """``HierarchicalModel`` of ``bert-base-uncased``, with the rules of the example that introduced them.

    Every encoder layer computes with the parameters of the lowest; BERT has no decoder, so those rules are without effect.
    """

    default_base = "bert-base-uncased"
    default_rules: ClassVar[Rules] = {
        "encoder": {"hidden_states": [True, True], "attention_weights": [False]},
        "decoder": {"hidden_states": [False], "attention_weights": [True]},
    }


@dataclass(frozen=True)
class ByRule:
    """Rules in the place of a plan, for ``hpr.share``: like a preset they fit nothing."""

    rules: Rules
    batch: Batch | None = None
    name: str = "replication rules"

    def read(self, model: nn.Module) -> Replication:
        """What the rules mean for a model."""
        return replication(self.rules, model, describe(model))

    def plan(self, model: nn.Module) -> Plan:
        """A validated plan whose budget is exactly what it needs."""
        anatomy, found = describe(model), self.read(model)
        plan = keep_all(anatomy)
        states = dict.fromkeys(found.copied, DROPPED) | dict.fromkeys(found.reused, WEIGHTS)
        if states:
            plan = with_layers(plan, anatomy, states, vanishing(model, states, self.batch))
        bound = unshareable(model, anatomy)
        entries = dict(plan.entries)
        for members in _groups(anatomy, found):
            if not bound.keys() & {site.name for site in members}:
                entries |= _tied(members, plan)
        plan = replace(plan, entries=entries, diagnostics={"label": self.name})
        plan = replace(plan, budget=Budget(self.name, plan.parameters(anatomy)))
        plan.validate(anatomy)
        return plan

    def fit(self, model: nn.Module, anatomy: Anatomy, plan: Plan) -> Fitted:
        """Every factor with the weight of the lowest layer that uses it, or some of its rows."""
        factors: dict[str, torch.Tensor] = {}
        for site in sorted(anatomy.sites, key=lambda one: one.layer or 0):
            for term in plan.entries[site.name].terms:
                start, stop = term.rows or (0, site.out_features)
                factors.setdefault(term.u, weight_at(model, site).detach()[start:stop])
        assert set(factors) == {name for entry in plan.entries.values() for name in factors_of(entry.terms)}
        return Fitted(factors, {})


@torch.no_grad()
def copy_below(student: nn.Module, anatomy: Anatomy, found: Replication) -> None:
    """Give layers that compute with the parameters of another its biases, norms and kept weights too, as copies, in place."""
    for layer, owner in found.computed_with.items():
        taker, giver = (module_at(student, path) for name in (layer, owner) for path in paths_of(anatomy, {name: ""}))
        given = dict(giver.named_parameters())
        for path, parameter in taker.named_parameters():
            if path in given and given[path].shape == parameter.shape:
                parameter.copy_(given[path])


def _opened(base: str | os.PathLike[str] | nn.Module | None) -> OpenModel:
    if isinstance(base, nn.Module):
        return OpenModel(base, None, objective_for(base).name, None, type(base).__name__)
    return open_model(base)


def _groups(anatomy: Anatomy, found: Replication) -> Iterable[list[Site]]:
    """Sites that are to read the same weight: one of a layer that lends its parameters, then those of the layers above."""
    by_layer: dict[str, dict[tuple[str, int | None], Site]] = {}
    for site in anatomy.sites:
        if site.kind == "linear" and (layer := site_layer(site)) is not None:
            by_layer.setdefault(layer, {})[site.slot, site.expert] = site
    borrowers: dict[str, list[str]] = {}
    for layer, owner in found.computed_with.items():
        borrowers.setdefault(owner, []).append(layer)
    for owner, layers in borrowers.items():
        for key, site in by_layer.get(owner, {}).items():
            others = [by_layer[layer][key] for layer in layers if key in by_layer[layer]]
            yield [
                site,
                *(one for one in others if (one.out_features, one.in_features) == (site.out_features, site.in_features)),
            ]


def _tied(members: list[Site], plan: Plan) -> dict[str, Entry]:
    """Entries by which sites share all rows that several have; of a fused projection some have those of values alone."""
    rows = {site.name: _rows(site, plan.entries[site.name]) for site in members}
    cuts = sorted({cut for runs in rows.values() for run in runs for cut in run})
    terms: dict[str, list[Term]] = {site.name: [] for site in members}
    group = tie.group_name(members)
    shared = False
    for start, stop in pairwise(cuts):
        users = [name for name, runs in rows.items() if any(first <= start and stop <= last for first, last in runs)]
        shared |= len(users) > 1
        for name in users:
            whole = len(cuts) == 2
            terms[name].append(Term(group if whole else f"{group}.{start}-{stop}", rows=None if whole else (start, stop)))
    if not shared:
        return {}
    return {
        name: Entry(REUSED if plan.entries[name].operator == REUSED else tie.TIE, tuple(own))
        for name, own in terms.items()
        if own
    }


def _rows(site: Site, entry: Entry) -> list[tuple[int, int]]:
    """The runs of rows of a site that have an effect."""
    if entry.operator == KEEP:
        return [(0, site.out_features)]
    return [term.rows or (0, site.out_features) for term in entry.terms]
