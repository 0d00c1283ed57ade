"""The batch of a typical call, for which time and operations are counted."""

from __future__ import annotations

from typing import Any

from torch import nn

from hpr.errors import BudgetError
from hpr.runtime.batch import Batch, example_batch, first_examples
from hpr.runtime.hooks import to_device_of
from hpr.timing.target import Target


def call_batch(model: nn.Module, target: Target, given: Batch | None = None) -> Batch:
    """A batch of the target's shape: random token ids for models that read them.

    Other models get the first examples of ``given``, or random ones if it is None; they have the positions that they have.
    Raises ``BudgetError`` for more tokens than the model has positions, and ``HprError`` if no batch can be made.
    """
    config: Any = getattr(model, "config", None)
    if config is not None and getattr(model, "main_input_name", "") == "input_ids" and not hasattr(config, "vision_config"):
        most = getattr(config.get_text_config(), "max_position_embeddings", None)
        if isinstance(most, int) and 0 < most < target.tokens:
            raise BudgetError(f"shape is {target.shape}, but {type(model).__name__} has {most} positions: give fewer tokens")
        return example_batch(model, target.examples, target.tokens)
    if given is not None:
        return first_examples(to_device_of(given, model), target.examples)
    return example_batch(model, target.examples)
