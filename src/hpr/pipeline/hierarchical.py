"""A model made hierarchical by rule, without a profile, in the manner of ``from_pretrained``."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from hpr.anatomy.describe import describe
from hpr.anatomy.lookup import module_at
from hpr.anatomy.model import Anatomy
from hpr.checkpoints import save
from hpr.checkpoints.open import open_model
from hpr.data.loaded_model import LoadedModel
from hpr.planning.rules import ByRule, Replication, Rules
from hpr.plans.layer_states import paths_of
from hpr.profiling.objectives import objective_for
from hpr.runtime.batch import Batch
from hpr.sharing.share import share

_log = logging.getLogger(__name__)


class HierarchicalModel(nn.Module):
    """A pretrained model whose layers reuse what the layers below have, as rules say (see ``planning.rules.replication``).

    ``base_model``: a folder, a hub id or a module, which stays untouched; None is the packaged all-MiniLM-L6-v2. After that the
    attribute ``base_model`` is the model with reuse, of the same class; calls, ``config`` and ``save_pretrained`` go there, and
    what is saved loads with ``AutoModel`` after ``import hpr``. ``replication`` says what the rules came to, and notes those
    without effect, which are logged as warnings too. ``batch`` is data for models whose inputs are unusual. Raises
    ``HprError`` for rules that mean nothing, and for layers that cannot do what they say.

    >>> made = hpr.HierarchicalModel(model, {"encoder": {"hidden_states": [False, True]}})
    >>> made.save_pretrained(folder / "rules").name
    'rules'
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
        loaded = _loaded(self.default_base if base_model is None else base_model)
        self.replication_rules = self.default_rules if replication_rules is None else replication_rules
        rules = ByRule(self.replication_rules, batch)
        self.replication = rules.read(loaded.model)
        self.base_model = share(loaded.model, rules)
        copy_below(self.base_model, describe(loaded.model), self.replication)
        self._source = (loaded.tokenizer, loaded.folder)
        for note in self.replication.notes:
            _log.warning("%s", note)

    @classmethod
    def from_pretrained(
        cls,
        base: str | os.PathLike[str] | nn.Module | None = None,
        replication_rules: Rules | None = None,
        batch: Batch | None = None,
    ) -> HierarchicalModel:
        """The same as the constructor, under the name that transformers uses."""
        return cls(base, replication_rules, batch)

    @property
    def config(self) -> Any:
        return self.base_model.config

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return self.base_model(*inputs, **named)

    def save_pretrained(self, folder: str | os.PathLike[str]) -> Path:
        """Write model and tokenizer into a folder, at once; returns it. Raises ``HprError`` for a folder of someone else."""
        tokenizer, source = self._source
        return save.save(self.base_model, folder, tokenizer, source=source)


class HierarchicalBert(HierarchicalModel):
    """``HierarchicalModel`` of ``bert-base-uncased``, with the rules of the example that introduced them.

    Every encoder layer computes with the parameters of the lowest; BERT has no decoder, so those rules are without effect.
    """

    default_base = "bert-base-uncased"
    default_rules: ClassVar[Rules] = {
        "encoder": {"hidden_states": [True, True], "attention_weights": [False]},
        "decoder": {"hidden_states": [False], "attention_weights": [True]},
    }


@torch.no_grad()
def copy_below(student: nn.Module, anatomy: Anatomy, found: Replication) -> None:
    """Give layers that compute with the parameters of another its biases, norms and kept weights too, as copies, in place."""
    for layer, owner in found.computed_with.items():
        taker, giver = (module_at(student, path) for name in (layer, owner) for path in paths_of(anatomy, {name: ""}))
        given = dict(giver.named_parameters())
        for path, parameter in taker.named_parameters():
            if path in given and given[path].shape == parameter.shape:
                parameter.copy_(given[path])


def _loaded(base: str | os.PathLike[str] | nn.Module | None) -> LoadedModel:
    if isinstance(base, nn.Module):
        return LoadedModel(base, None, objective_for(base).name, None, type(base).__name__)
    return open_model(base)
