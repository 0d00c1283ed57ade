"""Graphs of a sentence encoder in ONNX Runtime: what they take of texts and of memory, and what they give."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
import torch.nn.functional as F
from torch import Tensor

from common.tasks import Embed
from hpr.bench.contestants import Contestant
from hpr.bench.loading import session
from hpr.bench.run import alone
from hpr.data.batches import in_input_order, text_batches

_IDS = np.ones((1, 16), np.int64)


def feed_of(graph: ort.InferenceSession, batch: dict[str, Any]) -> dict[str, np.ndarray]:
    """The inputs that a graph takes, of a batch of ids and masks; segments are all the first."""
    given = {name: np.asarray(value) for name, value in batch.items()}
    given.setdefault("token_type_ids", np.zeros_like(given["input_ids"]))
    return {one.name: given[one.name] for one in graph.get_inputs()}


def embedder(graph: ort.InferenceSession, tokenizer: Any) -> Embed:
    """Texts → means of the last hidden states over real tokens."""

    def embed(texts: Sequence[str]) -> Tensor:
        batches = text_batches(texts, tokenizer, 64, 256)
        rows = []
        for batch in batches:
            [states] = graph.run(["last_hidden_state"], feed_of(graph, dict(batch)))
            mask = batch["attention_mask"][..., None].float()
            rows.append(F.normalize((torch.from_numpy(states) * mask).sum(1) / mask.sum(1), dim=-1))
        return in_input_order(torch.cat(rows), batches)

    return embed


def taken(file: Path, work: Path) -> dict[str, float]:
    """Bytes of memory that a fresh process takes for the graph after one pass, and seconds to load it."""
    feed = feed_of(session(str(file), 1), {"input_ids": _IDS, "attention_mask": np.ones_like(_IDS)})
    found = alone(Contestant(file.stem, "onnxruntime", str(file)), feed, 1, work)
    return {"resident": found["resident_bytes"] - found["imported_bytes"], "seconds": found["load_s"]}
