"""A small random batch of the kind that a transformers model takes, where no data is at hand.

It serves to see which parts of a model depend on which; it says nothing about quality.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hpr.errors import HprError
from hpr.profiling.objectives import Batch

_EXAMPLES, _POSITIONS, _SAMPLES = 2, 12, 4000  # a quarter of a second of sound at 16 kHz


def specimen(model: nn.Module, seed: int = 0) -> Batch:
    """Two random examples: token ids (2, 12), pixels (2, channels, height, width), a wave (2, 4000) or a spectrogram.

    Which of them, the model's ``main_input_name`` says; sizes are those of its configuration. Encoder–decoders get decoder ids
    too. Raises ``HprError`` for a model that takes anything else, or has no configuration.
    """
    config: Any = getattr(model, "config", None)
    name = getattr(model, "main_input_name", None)
    draw = torch.Generator().manual_seed(seed)
    if config is None or name not in _MAKERS:
        raise HprError(f"{type(model).__name__} does not say what inputs it takes: give a batch of its data")
    batch = _MAKERS[name](config, draw)
    if getattr(config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = _ids(config, draw)
    if name == "input_ids" and hasattr(config, "vision_config"):
        batch |= _pixels(config, draw)
    if name == "pixel_values" and hasattr(config, "text_config"):
        batch |= _tokens(config, draw)
    device = next(model.parameters()).device
    return {key: value.to(device) for key, value in batch.items()}


def _ids(config: Any, draw: torch.Generator) -> Tensor:
    vocabulary = config.get_text_config().vocab_size
    return torch.randint(vocabulary // 4, vocabulary, (_EXAMPLES, _POSITIONS), generator=draw)  # special tokens come first


def _tokens(config: Any, draw: torch.Generator) -> dict[str, Tensor]:
    ids = _ids(config, draw)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _pixels(config: Any, draw: torch.Generator) -> dict[str, Tensor]:
    config = getattr(config, "vision_config", config)
    size = config.image_size if isinstance(config.image_size, tuple | list) else (config.image_size, config.image_size)
    return {"pixel_values": torch.randn(_EXAMPLES, config.num_channels, *size, generator=draw)}


def _wave(config: Any, draw: torch.Generator) -> dict[str, Tensor]:
    return {"input_values": torch.randn(_EXAMPLES, _SAMPLES, generator=draw)}


def _spectrogram(config: Any, draw: torch.Generator) -> dict[str, Tensor]:
    return {"input_features": torch.randn(_EXAMPLES, config.num_mel_bins, 2 * config.max_source_positions, generator=draw)}


_MAKERS = {"input_ids": _tokens, "pixel_values": _pixels, "input_values": _wave, "input_features": _spectrogram}
