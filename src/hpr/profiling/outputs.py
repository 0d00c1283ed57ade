"""Read the outputs of a model: its predictions (batch, …, d), and the weight (batch, …) of each, 0 for padding."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hpr.errors import HprError
from hpr.runtime.batch import IGNORED, Batch, mask_of

_NEVER = -1e4  # the logit of a position that is padding: its probability is 0 in float32, and its gradient is finite
_LOGITS = ("logits", "prediction_logits")  # some models for pretraining name those of their tokens so


def read_mean_pooled(outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The mean of an example's hidden states, normalised: (batch, d)."""
    hidden = _hidden(outputs).float()
    mask = mask_of(batch, hidden).unsqueeze(-1)
    pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
    return F.normalize(pooled, dim=-1), torch.ones(len(pooled), device=pooled.device)


def read_first_token(outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The hidden state of the first position, normalised: (batch, d)."""
    first = _hidden(outputs).float()[:, 0]
    return F.normalize(first, dim=-1), torch.ones(len(first), device=first.device)


def read_hidden(outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The last hidden states, (batch, positions, d)."""
    hidden = _hidden(outputs)
    return hidden, mask_of(batch, hidden)


def read_scores(outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The logits of each example, (batch, d): of classes, of yes/no answers, or numbers."""
    logits = _logits(outputs)
    return logits, _ones(logits)


def read_tokens(outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The logits at each position, (batch, positions, d)."""
    logits = _logits(outputs)
    return logits, mask_of(batch, logits)


def read_frames(outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The logits at each frame of a sound, (batch, frames, d). Frames are fewer than samples, so the mask is shrunk to them."""
    logits = _logits(outputs)
    mask = batch.get("attention_mask")
    if mask is None or logits.dim() != 3 or mask.dim() != 2:
        return logits, _ones(logits)
    frames = logits.shape[1]
    nearest = torch.arange(frames, device=mask.device) * mask.shape[1] // frames
    return logits, mask[:, nearest].float()


def read_decoder(outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The logits at each target position, (batch, positions, d)."""
    logits = _logits(outputs)
    labels = batch.get("labels")
    mask = batch.get("decoder_attention_mask") if labels is None else labels != IGNORED
    return logits, _ones(logits) if mask is None else mask.float()


def read_pixels(outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The logits of each pixel, (batch, height, width, d); models give (batch, d, height, width)."""
    logits = _logits(outputs)
    if logits.dim() != 4:
        raise HprError(
            f"the logits have shape {tuple(logits.shape)}, not (batch, classes, height, width): give another objective"
        )
    logits = logits.movedim(1, -1)
    return logits, _ones(logits)


def read_spans(outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Start and end of an answer: two distributions over positions, (batch, 2, positions). Padding is no position."""
    start, end = (getattr(outputs, name, None) for name in ("start_logits", "end_logits"))
    if not (isinstance(start, Tensor) and isinstance(end, Tensor)):
        raise HprError(f"a {type(outputs).__name__} has no start_logits and end_logits: give another objective than 'spans'")
    logits = torch.stack((start, end), dim=1)
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape == logits[:, 0].shape:
        logits = logits.masked_fill(mask[:, None] == 0, _NEVER)
    return logits, _ones(logits)


def read_pair(outputs: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """The embeddings of both towers of a contrastive model, normalised: (batch, 2, d), such as a picture's and its text's."""
    found = [getattr(outputs, name) for name in ("image_embeds", "audio_embeds", "text_embeds") if hasattr(outputs, name)]
    found = [rows for rows in found if isinstance(rows, Tensor) and rows.dim() == 2]
    if len(found) != 2 or found[0].shape != found[1].shape:
        shapes = " and ".join(str(tuple(rows.shape)) for rows in found) or "none"
        raise HprError(
            f"two towers give embeddings of shape {shapes}: give batches with as many pictures (or sounds) as texts, "
            f"or another objective than 'contrastive'"
        )
    pair = F.normalize(torch.stack([rows.float() for rows in found], dim=1), dim=-1)
    return pair, _ones(pair)


def first_not_finite(predictions: Tensor, weight: Tensor) -> int | None:
    """The first example with predictions that are not finite; positions of weight 0 (padding) do not count."""
    wrong = ~torch.isfinite(predictions).all(-1) & (weight != 0)
    return int(wrong.nonzero()[0][0]) if bool(wrong.any()) else None


def _ones(predictions: Tensor) -> Tensor:
    return torch.ones(predictions.shape[:-1], device=predictions.device)


def _hidden(outputs: Any) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs
    hidden = getattr(outputs, "last_hidden_state", None)
    maps = getattr(outputs, "feature_maps", None)
    if hidden is None and maps:  # a backbone: whoever reads it may read every map, of any shape
        return torch.cat([one.flatten(1) for one in maps], dim=1)[:, None]
    first = hidden if isinstance(hidden, Tensor) else outputs[0]
    if not isinstance(first, Tensor) or first.dim() < 2:
        raise HprError(f"a {type(outputs).__name__} has no hidden states of shape (batch, …, d): give another objective")
    return first


def _logits(outputs: Any) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs
    found = next((getattr(outputs, name) for name in _LOGITS if isinstance(getattr(outputs, name, None), Tensor)), None)
    if found is None:
        raise HprError(f"a {type(outputs).__name__} has no logits: give another objective, such as hidden")
    return found
