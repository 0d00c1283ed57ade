"""The floor: a table of one vector for each token, and no network (in the manner of model2vec, by MinishLab)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from common.quantised.student import Peer
from hpr.evaluation.divergence import embeddings
from hpr.profiling.objectives import Objective

_USUAL = 1e-3  # frequency at which a token has half of the weight of a rare one


class Static(nn.Module):
    """Hidden states that are rows of a table (V, k) times a map (k, d), whatever the other tokens are."""

    def __init__(self, table: Float[Tensor, "V k"], back: Float[Tensor, "k d"], offset: Float[Tensor, " d"]):
        super().__init__()
        self.table, self.back, self.offset = (nn.Parameter(part) for part in (table, back, offset))

    def forward(self, input_ids: Tensor, **others: Tensor) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.table[input_ids] @ self.back + self.offset)


def token_outputs(model: nn.Module, tokenizer: Any, goal: Objective) -> Float[Tensor, "V d"]:
    """The model's output for every token of the vocabulary alone, between the tokens that open and close a text."""
    count = len(tokenizer)
    ids = torch.tensor([[tokenizer.cls_token_id, token, tokenizer.sep_token_id] for token in range(count)])
    return embeddings(model, [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(512)], goal)


def static(outputs: Float[Tensor, "V d"], shares: Float[Tensor, " V"], width: int, fit: tuple[Sequence[Any], Tensor]) -> Peer:
    """Token outputs reduced to their first principal components, weighted down by frequency, 8 bits a number.

    ``shares``: how often each token occurs, as a share. ``fit``: calibration batches and the model's embeddings (n, d) of
    them, on which a linear map back to the model's space is fitted, because divergence compares vectors of one space.
    """
    batches, wanted = fit
    centred = (outputs - outputs.mean(0)).double()
    axes = torch.linalg.svd(centred, full_matrices=False).Vh[:width]
    table = centred @ axes.T * (_USUAL / (_USUAL + shares.double()))[:, None]
    scale = table.abs().amax(0) / 127
    table = (table / scale).round() * scale
    means = []
    for batch in batches:
        mask = batch["attention_mask"].double()[:, :, None]
        means.append((table[batch["input_ids"]] * mask).sum(1) / mask.sum(1))
    inputs = torch.cat(means)
    inputs = torch.cat([inputs, torch.ones(len(inputs), 1).double()], 1)
    damping = 1e-6 * torch.eye(inputs.shape[1]).double() * len(inputs)
    solved = torch.linalg.solve(inputs.T @ inputs + damping, inputs.T @ wanted.double()).half().float()
    size = table.numel() + 2 * (scale.numel() + solved.numel())
    return Peer(Static(table.float(), solved[:-1], solved[-1]), {"fixed": size})
