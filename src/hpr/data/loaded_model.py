"""``LoadedModel``: a model in memory with its tokenizer and objective."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hpr.anatomy.wrappers import unwrapped
from hpr.profiling.objectives import Objective, objective_for


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, with its tokenizer, objective, folder and name.

    ``tokenizer`` is None for a model without tokenizer files. ``objective`` is a key of
    ``hpr.profiling.objectives.OBJECTIVES``. ``folder`` holds the files of the model; it is None for a model that was built in
    memory. ``label`` names the model in reports and error messages.
    """

    model: nn.Module
    tokenizer: Any | None
    objective: str
    folder: Path | None
    label: str

    @property
    def goal(self) -> Objective:
        """The ``Objective`` with the name ``objective``. Raises ``HprError`` for an unknown name."""
        return objective_for(self.model, self.objective)


def as_loaded(model: nn.Module, tokenizer: Any | None = None, objective: str | None = None) -> LoadedModel:
    """A ``LoadedModel`` for a model in memory. Without ``objective`` it has the default objective of the model's class.

    Wrappers such as DataParallel and torch.compile are taken off. Raises ``HprError`` for those that cannot be (``unwrapped``).
    """
    model = unwrapped(model)
    return LoadedModel(model, tokenizer, objective or objective_for(model).name, None, type(model).__name__)
