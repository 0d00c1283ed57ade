"""A model in memory with its tokenizer and objective."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from hpr.profiling.objectives import Objective, objective_for


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with what belongs to it.

    ``objective`` is a key of ``hpr.profiling.objectives.OBJECTIVES``; ``folder`` holds the files it was read from (None for
    a model that was built in memory), ``label`` names it in reports. Without tokenizer files ``tokenizer`` is None.
    """

    model: nn.Module
    tokenizer: Any | None
    objective: str
    folder: Path | None
    label: str

    @property
    def goal(self) -> Objective:
        """The objective itself."""
        return objective_for(self.model, self.objective)


def as_loaded(model: nn.Module, tokenizer: Any | None = None, objective: str | None = None) -> LoadedModel:
    """A model that is in memory already, with what belongs to it; its objective is that of its class unless named."""
    return LoadedModel(model, tokenizer, objective or objective_for(model).name, None, type(model).__name__)
