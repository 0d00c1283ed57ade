"""Batches of model inputs: convert them, make an example, and read their examples and their mask.

Inside the package a batch is always a mapping of input names to tensors. Public functions also take a bare tensor, which is
the only positional input of a plain module. ``as_batch`` gives it the reserved name ``POSITIONAL``, and ``hooks.run`` passes
it to the module as a positional argument.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from hpr.errors import DataError, HprError

Batch = Mapping[str, Tensor]
BatchLike = Batch | Tensor  # what public functions take
POSITIONAL = "input"  # the name of the input that a plain module takes as its only argument
IGNORED = -100  # the label of a position that the loss of transformers leaves out


def as_batch(batch: BatchLike) -> Batch:
    """A batch as a mapping: a bare tensor becomes ``{POSITIONAL: tensor}``.

    Raises ``DataError`` for anything else.

    >>> as_batch(torch.zeros(2, 3)).keys()
    dict_keys(['input'])
    """
    if isinstance(batch, Mapping):
        return batch
    if isinstance(batch, Tensor):
        return {POSITIONAL: batch}
    raise DataError(f"a batch is a {type(batch).__name__}: give a tensor, or a mapping of input names to tensors")


def as_batches(batches: Sequence[BatchLike]) -> Sequence[Batch]:
    """The batches as mappings. Returns a list of mappings unchanged; a converted list keeps its class and its attributes."""
    converted = [as_batch(batch) for batch in batches]
    if all(new is old for new, old in zip(converted, batches, strict=True)):
        return batches  # type: ignore[return-value]
    if not isinstance(batches, list):
        return converted
    copied = copy.copy(batches)  # keeps the class, because ``Batches`` store the order of their examples
    copied[:] = converted
    return copied  # type: ignore[return-value]


def example_batch(model: nn.Module, examples: int = 2, tokens: int = 8) -> dict[str, Tensor]:
    """A batch of random examples for a transformers model: token ids, images or sound, by its configuration.

    The tensors are on the model's device. Raises ``HprError`` if the configuration does not say what the model reads.
    """
    config: Any = getattr(model, "config", None)
    draw = torch.Generator().manual_seed(0)
    name = getattr(model, "main_input_name", "")
    vision = getattr(config, "vision_config", config)
    batch: dict[str, Tensor] = {}
    if name == "input_ids":
        batch[name] = _ids(model, (examples, tokens), draw)
    if name == "pixel_values" or (name == "input_ids" and vision is not config):
        side = getattr(vision, "image_size", None) or 224
        height, width = (side, side) if isinstance(side, int) else side
        batch["pixel_values"] = torch.randn(examples, getattr(vision, "num_channels", 3), height, width, generator=draw)
    if name == "input_values":
        batch[name] = torch.randn(examples, 4000, generator=draw)
    if name == "input_features" and hasattr(config, "num_mel_bins") and hasattr(config, "max_source_positions"):
        batch[name] = torch.randn(examples, config.num_mel_bins, 2 * config.max_source_positions, generator=draw)
    if not batch or config is None:
        raise HprError(f"the configuration of {type(model).__name__} does not say what the model reads: give a batch")
    if getattr(config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = _ids(model, (examples, tokens), draw)
    return {key: value.to(next(model.parameters()).device) for key, value in batch.items()}


def _ids(model: Any, shape: tuple[int, int], draw: torch.Generator) -> Tensor:
    """Random token ids, (examples, tokens)."""
    return torch.randint(model.config.get_text_config().vocab_size, shape, generator=draw)


def examples_in(batch: Batch) -> int:
    """The number of examples in a batch."""
    return len(next(iter(batch.values())))


def lengths_in(batch: Batch) -> set[int]:
    """The numbers of positions that the inputs of a batch have: the sizes of their second axes."""
    return {value.shape[1] for value in batch.values() if isinstance(value, Tensor) and value.dim() > 1}


def is_square(batch: Batch) -> bool:
    """Whether an input has as many positions as there are examples, so that shapes do not tell which of the two comes first.

    One position of one example comes first either way.
    """
    return examples_in(batch) > 1 and examples_in(batch) in lengths_in(batch)


def mask_of(batch: Batch, positions: Shaped[Tensor, "*batch d"], turned: bool = False) -> Float[Tensor, "*batch"]:
    """The weight of each vector of ``positions``: 1 for a real token, 0 for padding.

    Reads the attention mask (batch, positions). All weights are 1 if the batch has no mask of that shape, whichever of the two
    the vectors have first (``turned``: see ``has_positions_first``).
    """
    mask = batch.get("attention_mask")
    if mask is not None and mask.dim() == 2 and has_positions_first(positions, batch, turned):
        mask = mask.T
    if mask is None or positions.dim() != 3 or mask.shape != positions.shape[:2]:
        return torch.ones(positions.shape[:-1], device=positions.device)
    return mask.float()


def has_positions_first(states: Tensor, batch: Batch, turned: bool = False) -> bool:
    """Whether hidden states are (positions, batch, d), as inside XLNet and FSMT, and not (batch, positions, d).

    Only states that have as many positions as an input of the batch are taken for such: blocks that read several choices or
    patches of an example as examples of their own have the batch first, with more examples. ``turned`` decides where there are
    as many positions as examples: whether the states have positions first in other batches (``profiling.layout``).
    """
    if states.dim() != 3 or states.shape[1] != examples_in(batch) or len(states) not in lengths_in(batch):
        return False
    return turned or len(states) != states.shape[1]


def first_examples(batch: Batch, count: int) -> Batch:
    """The first examples of a batch, at most ``count``. Values without an example axis stay as they are.

    Some processors pack the patches of all images along one axis, and give each image's number of patches as a grid
    (``pixel_values`` with ``image_grid_thw``). Such patches are cut with their grid.
    """

    def cut(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim():
            return value
        if len(value) == size:
            return value[:count]
        grid = _grid_of(batch, name)
        if grid is not None and len(grid) == size and len(value) == int(grid.prod(-1).sum()):
            return value[: int(grid[:count].prod(-1).sum())]
        return value

    size = examples_in(batch)
    return {key: cut(key, value) for key, value in batch.items()}


def _grid_of(batch: Batch, name: str) -> Tensor | None:
    """The grid (images, axes) that says how many of the packed patches of an input each image has."""
    if not name.startswith("pixel_values"):
        return None
    kinds = ("video_",) if name.endswith("_videos") else ("image_", "")
    names = [f"{kind}grid_{axes}" for kind in kinds for axes in ("thw", "hws")]
    return next((batch[one] for one in names if one in batch), None)
