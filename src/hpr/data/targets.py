"""Generates targets for sequence-to-sequence models by the model itself."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

from hpr.errors import HprError
from hpr.runtime.hooks import to_device_of


@torch.no_grad()
def own_answers(model: nn.Module, batch: Mapping[str, Tensor], longer: int = 32) -> Int[Tensor, "batch positions"]:
    """The tokens that a sequence-to-sequence model generates greedily for a batch, as labels with −100 after the end token.

    A user then needs no target texts, and the targets are those that the model meets in use. The labels have at most
    ``longer`` tokens more than the input has positions. Raises ``HprError`` for a model that cannot generate.
    """
    if not (isinstance(model, PreTrainedModel) and isinstance(model, GenerationMixin)):
        raise HprError(f"{type(model).__name__} cannot generate targets: give batches with labels")
    given = to_device_of({key: batch[key] for key in (model.main_input_name, "attention_mask") if key in batch}, model)
    length = min(batch[model.main_input_name].shape[1] + longer, longest_input(model) - 1)
    settings: dict[str, Any] = {"max_new_tokens": length, "num_beams": 1, "do_sample": False, "return_dict_in_generate": False}
    # the generate method of the base class: that of speech models cuts recordings and strips the first decoder tokens
    written = GenerationMixin.generate(model, **given, **settings)  # type: ignore[arg-type]
    assert isinstance(written, Tensor)
    labels = written[:, 1:].to(batch[model.main_input_name].device)
    end = model.generation_config.eos_token_id if model.generation_config is not None else None
    if end is None:
        return labels
    ends = torch.isin(labels, torch.as_tensor(end, device=labels.device))
    return labels.masked_fill(ends.cumsum(1) - ends.long() > 0, -100)


def longest_input(model: nn.Module) -> int:
    """The highest number of tokens that a model takes at once; ``sys.maxsize`` if its configuration names none.

    Models like RoBERTa keep the first rows of their table of positions for padding, so they take fewer tokens than it has rows.
    """
    config = getattr(model, "config", None)
    text = config.get_text_config() if isinstance(config, PreTrainedConfig) else config
    names = ("max_target_positions", "max_position_embeddings", "max_seq_len", "max_sequence_length")
    counts = [getattr(one, name, None) for one in (config, text) for name in names]
    limit = next((count for count in counts if isinstance(count, int) and count > 1), sys.maxsize)
    tables = (module for name, module in model.named_modules() if "position" in name.rpartition(".")[2])
    usable = [
        table.num_embeddings - table.padding_idx - 1
        for table in tables
        if isinstance(table, nn.Embedding) and table.padding_idx is not None
    ]
    return min([limit, *usable])
