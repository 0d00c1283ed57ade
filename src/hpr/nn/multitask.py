"""Many tasks, one body: a head for each task on one model, healed together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from hpr.errors import HprError
from hpr.runtime.batch import Batch, examples_in, mask_of

TASK = "task"  # the input that says which task a batch is of


class ManyHeads(nn.Module):
    """A body that emits hidden states, and for each task a linear head on their mean over the positions that count.

    ``outputs``: task → number of classes, or 1 for a score. A further task costs ``hidden · outputs + outputs`` parameters. The
    body may be shared or dense, and what heads share of it is trained by all tasks: give ``hpr.heal`` the ``batches`` of
    every task by name with ``shares`` for their weights, and ``Weights(outputs=0, labels=1)``. Batches need labels: class
    numbers, or scores, of which the squared error counts. Raises ``HprError`` for no tasks, and for a body of unknown width.
    """

    base_model_prefix = "body"

    def __init__(self, body: nn.Module, outputs: Mapping[str, int]):
        super().__init__()
        width = getattr(getattr(body, "config", None), "hidden_size", None)
        if not isinstance(width, int):
            raise HprError(f"this {type(body).__name__} has no config with a hidden_size: take a body of transformers")
        if not outputs or min(outputs.values()) < 1:
            raise HprError(f"outputs {dict(outputs)}: at least one task, each with at least one output")
        like = next(body.parameters())
        self.body = body
        self.names = list(outputs)
        self.heads = nn.ModuleList([nn.Linear(width, count).to(like) for count in outputs.values()])
        self.train(body.training)

    def forward(self, task: Tensor, labels: Tensor | None = None, **inputs: Any) -> SequenceClassifierOutput:
        """``logits`` (batch, outputs), and with ``labels`` (batch,) the ``loss`` in nats, or the squared error of scores.

        ``task`` (batch,) is the same number throughout, from ``batches``.
        """
        states = self.body(**inputs)
        hidden = states if isinstance(states, Tensor) else states[0]
        kept = mask_of(inputs, hidden).unsqueeze(-1)
        pooled = (hidden * kept).sum(1) / kept.sum(1).clamp(min=1)
        logits = self.heads[int(task[0])](pooled)
        loss = None
        if labels is not None and logits.shape[-1] == 1:
            loss = F.mse_loss(logits.squeeze(-1).float(), labels.float())
        elif labels is not None:
            loss = F.cross_entropy(logits.float(), labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)

    def batches(self, name: str, batches: Sequence[Batch]) -> list[Batch]:
        """The batches of a task, marked as such. Raises ``HprError`` for a task that has no head."""
        if name not in self.names:
            raise HprError(f"no head for {name!r}: there are {', '.join(self.names)}")
        number = self.names.index(name)
        return [{**batch, TASK: torch.full((examples_in(batch),), number)} for batch in batches]
