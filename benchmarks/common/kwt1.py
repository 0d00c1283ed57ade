"""KWT-1, keyword spotting on speech: 12 post-norm encoder layers of width 64 (Berg et al., 2021). No PreTrainedModel."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import BertConfig
from transformers.models.bert.modeling_bert import BertEncoder


class Kwt1(nn.Module):
    """MFCC frames (B, 98, 40) → logits (B, 12). A class embedding stands before the frames, and the head reads it.

    Labels may stand in a batch; they are for who compares them.
    """

    def __init__(self, config: BertConfig, features: int, frames: int, labels: int):
        super().__init__()
        self.input = nn.Linear(features, config.hidden_size)
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.position_embedding = nn.Parameter(torch.zeros(1, frames + 1, config.hidden_size))
        self.encoder = BertEncoder(config)
        self.head = nn.Linear(config.hidden_size, labels)

    def forward(self, mfcc: Tensor, labels: Tensor | None = None) -> Tensor:
        start = self.class_embedding.expand(len(mfcc), -1, -1)
        hidden = torch.cat([start, self.input(mfcc)], dim=1) + self.position_embedding
        return self.head(self.encoder(hidden).last_hidden_state[:, 0])


def load(folder: str | os.PathLike[str]) -> nn.Module:
    """KWT-1 from a folder with ``config.json`` and ``model.safetensors``, in evaluation mode; every weight is used."""
    path = Path(folder)
    raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act", "layer_norm_eps")
    config = BertConfig(**{name: raw[name] for name in names}, attn_implementation="sdpa")
    weights = load_file(path / "model.safetensors")
    model = Kwt1(config, weights["input.weight"].shape[1], weights["position_embedding"].shape[1] - 1, len(raw["labels"]))
    model.load_state_dict(weights)
    return model.eval()
