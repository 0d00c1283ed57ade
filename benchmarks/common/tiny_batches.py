"""Random batches for any tiny model, by what its forward takes: text, images, sound, boxes, and texts with images in them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from common.tiny_models import IMAGE, TOKEN, VOCABULARY

EXAMPLES = 4
LENGTH = 16
Batch = dict[str, Tensor]


class NoBatch(Exception):
    """No batch of the rules below passes through the model; the message says what the model says to the last."""


def fitting(model: nn.Module, task: str) -> int:
    """The number of the first of ``candidates`` that passes through the model with finite outputs."""
    said = ""
    for number, batch in enumerate(candidates(model, task, 1)):
        try:
            with torch.no_grad():
                found = main_output(model(**batch))
            if torch.isfinite(found).all():
                return number
            complaint = "its outputs are not finite"
        except Exception as error:  # each candidate is a guess: what a model says to the first, its best one, is the reason
            complaint = f"{type(error).__name__}: {error}"
        said = said or complaint
    raise NoBatch(said or "it takes no text, images, sound or series")


def batch_for(model: nn.Module, task: str, number: int, seed: int) -> Batch:
    """The candidate of that number, with other random values for each seed."""
    return next(islice(candidates(model, task, seed), number, None))


def main_output(outputs: Any) -> Tensor:
    """Logits where there are any, or the first output of floating-point numbers."""
    if isinstance(outputs, Tensor):
        return outputs
    for name in ("logits", "logits_per_image", "start_logits", "prediction_logits", "last_hidden_state"):
        if isinstance(found := getattr(outputs, name, None), Tensor):
            return found
    for found in outputs.values() if hasattr(outputs, "values") else outputs:
        if isinstance(found, Tensor) and found.is_floating_point() and found.dim():
            return found
        if isinstance(found, tuple | list) and found and isinstance(found[0], Tensor):
            return found[-1]
    raise ValueError(f"{type(outputs).__name__} has no output to compare")


def candidates(model: Any, task: str, seed: int) -> Iterator[Batch]:
    """Batches in the order of preference: all kinds of input that the model takes at once, then fewer."""
    takes = inspect.signature(model.forward).parameters
    sights = list(images(model, takes, seed)) if "pixel_values" in takes else []
    sounds = list(waves(model, takes, seed))
    texts = list(text(model, takes, task, seed)) if "input_ids" in takes else []
    for words in texts:
        for kind, found in (("image", sights), ("audio", sounds)):
            for extra in found:
                yield from with_tokens(model, words, extra, kind)
    for one in sights + sounds if getattr(model, "main_input_name", "") != "input_ids" or not texts else []:
        yield one
        if "decoder_input_ids" in takes:
            yield one | {"decoder_input_ids": ids(model, seed, (EXAMPLES, LENGTH))}
    yield from texts
    yield from sights + sounds
    if "past_values" in takes:
        yield from series(model, takes, seed)


def special_ids(config: Any) -> set[int]:
    """Ids that mean something to the model."""
    found: set[int] = set()
    for name, value in config.to_dict().items():
        if TOKEN.search(name):
            found |= {one for one in (value if isinstance(value, list) else [value]) if isinstance(one, int)}
    for name in getattr(config, "sub_configs_defaults", {}):
        if isinstance(part := getattr(config, name, None), tf.PreTrainedConfig):
            found |= special_ids(part)
    return found


def ids(model: Any, seed: int, shape: tuple[int, ...]) -> Tensor:
    """Random ids that mean nothing special."""
    config = model.config
    sizes = [getattr(one, "vocab_size", None) for one in (config.get_text_config(decoder=True), config)]
    size = min([one for one in sizes if isinstance(one, int) and one > 8] or [VOCABULARY])
    allowed = torch.tensor(sorted(set(range(3, min(size, 70))) - special_ids(config)))
    return allowed[torch.randint(len(allowed), shape, generator=torch.Generator().manual_seed(seed))]


def text(model: Any, takes: Any, task: str, seed: int) -> Iterator[Batch]:
    """Texts, half of them padded on the right; then without padding."""
    shape = (EXAMPLES, 2, LENGTH) if "multiple_choice" in task else (EXAMPLES, LENGTH)
    found: Batch = {"input_ids": ids(model, seed, shape)}
    config = model.config.get_text_config(decoder=True)
    end, padding = (getattr(config, name, None) for name in ("eos_token_id", "pad_token_id"))
    if isinstance(end, int) and 0 <= end < VOCABULARY:
        found["input_ids"][..., -1] = end
    if "bbox" in takes:
        corner = torch.randint(0, 20, (*shape, 2), generator=torch.Generator().manual_seed(seed))
        boxes = torch.cat([corner, corner + 9], dim=-1)
        found["bbox"] = boxes.float() / 64 if type(model).__name__.startswith("Bros") else boxes
    if "decoder_input_ids" in takes and not any(word in task for word in ("classification", "question")):
        found["decoder_input_ids"] = ids(model, seed + 1, shape)
    if "attention_mask" in takes:
        mask = torch.ones(shape, dtype=torch.long)
        mask[EXAMPLES // 2 :, ..., -4:] = 0
        padded = torch.where(mask.bool(), found["input_ids"], padding if isinstance(padding, int) and padding >= 0 else 0)
        if isinstance(end, int) and 0 <= end < VOCABULARY:
            padded[EXAMPLES // 2 :, ..., -5] = end
        yield found | {"input_ids": padded, "attention_mask": mask}
    yield found
    if "decoder_input_ids" in takes and "decoder_input_ids" not in found:
        yield found | {"decoder_input_ids": ids(model, seed + 1, shape)}


def with_tokens(model: Any, words: Batch, extra: Batch, kind: str) -> Iterator[Batch]:
    """Texts with images or sounds: as two inputs, or with as many image tokens in the text as the image has vectors."""
    owner = next((one for one in (model, getattr(model, "model", None)) if hasattr(one, f"get_{kind}_features")), None)
    names = (f"{kind}_token_id", f"{kind}_token_index", f"{kind}_token", f"{kind}_patch_id")
    token = _number([model.config], *names)
    if owner is not None and token is not None and words["input_ids"].dim() == 2:
        try:
            takes = inspect.signature(getattr(owner, f"get_{kind}_features")).parameters
            with torch.no_grad():
                found = getattr(owner, f"get_{kind}_features")(**{key: value for key, value in extra.items() if key in takes})
        except Exception:  # a wrong guess of the input
            return
        count = vectors(found) // EXAMPLES
        if not 0 < count <= 256:
            return
        tokens = torch.full((EXAMPLES, count), token)
        placed = {"input_ids": torch.cat([words["input_ids"][:, :1], tokens, words["input_ids"][:, 1:]], dim=1)}
        if "attention_mask" in words:
            placed["attention_mask"] = torch.cat([torch.ones_like(tokens), words["attention_mask"]], dim=1)
        if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
            placed["mm_token_type_ids"] = (placed["input_ids"] == token).long()
        yield words | placed | extra
    else:
        yield words | extra


def _number(parts: Sequence[Any], *names: str) -> int | None:
    """The first whole number that one of the configurations has under one of the names."""
    found = (getattr(part, name, None) for part in parts for name in names)
    return next((value for value in found if isinstance(value, int)), None)


def vectors(found: Any) -> int:
    """The number of vectors in what ``get_image_features`` gives."""
    found = getattr(found, "pooler_output", found)
    if isinstance(found, Tensor):
        return found.shape[:-1].numel()
    return sum(vectors(one) for one in found) if isinstance(found, list | tuple) else 0


def images(model: Any, takes: Any, seed: int) -> Iterator[Batch]:
    """Images of the size in the configuration, in every shape that models take."""
    draw = torch.Generator().manual_seed(seed)
    config = model.config
    parts = [config] + [part for part in vars(config).values() if isinstance(part, tf.PreTrainedConfig)]
    part = next((one for one in parts if hasattr(one, "patch_size") or hasattr(one, "image_size")), config)
    size = getattr(part, "image_size", None) or IMAGE
    height, width = (size, size) if isinstance(size, int) else size[:2]
    channels = _number(parts, "num_channels", "in_channels", "in_chans") or 3
    patch = getattr(part, "patch_size", None) or getattr(part, "spatial_patch_size", None) or 8
    patch = patch if isinstance(patch, int) else patch[0]
    if grid := next((name for name in ("image_grid_thw", "grid_thw", "image_grid_hws") if name in takes), None):
        depth = getattr(part, "temporal_patch_size", 1)
        for times in {depth, 1}:
            pixels = torch.randn(EXAMPLES * 16, channels * times * patch * patch, generator=draw)
            yield {"pixel_values": pixels, grid: torch.tensor([[1, 4, 4]] * EXAMPLES)[:, 1 if grid.endswith("hws") else 0 :]}
    if "spatial_shapes" in takes or "pixel_attention_mask" in takes:
        pixels = torch.randn(EXAMPLES, 16, channels * patch * patch, generator=draw)
        whole = {"pixel_values": pixels, "pixel_attention_mask": torch.ones(EXAMPLES, 16, dtype=torch.long)}
        yield whole | ({"spatial_shapes": torch.tensor([[4, 4]] * EXAMPLES)} if "spatial_shapes" in takes else {})
    if "pixel_position_ids" in takes or "image_position_ids" in takes:
        name = "pixel_position_ids" if "pixel_position_ids" in takes else "image_position_ids"
        grid_positions = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij"), -1).reshape(1, 16, 2)
        pixels = torch.rand(EXAMPLES, 16, channels * patch * patch, generator=draw)
        yield {"pixel_values": pixels, name: grid_positions.expand(EXAMPLES, 16, 2).contiguous()}
    sizes = {"image_sizes": torch.tensor([[height, width]] * EXAMPLES)} if "image_sizes" in takes else {}
    shapes = [(height, width)] + [(side, side) for side in (64, 128, 224) if side != height]
    for high, wide in shapes:
        frames = getattr(config, "num_frames", 4)
        for lead in ((EXAMPLES,), (EXAMPLES, 1), (EXAMPLES, 2), (EXAMPLES, frames), (EXAMPLES, 5)):
            yield {"pixel_values": torch.randn(*lead, channels, high, wide, generator=draw)} | sizes


def waves(model: Any, takes: Any, seed: int) -> Iterator[Batch]:
    """Sounds as samples or as spectra, in every order of axes that models take."""
    draw = torch.Generator().manual_seed(seed)
    config = model.config
    parts = [config] + [part for part in vars(config).values() if isinstance(part, tf.PreTrainedConfig)]

    bins = _number(parts, "num_mel_bins", "input_feat_per_channel", "feature_size", "n_mels", "input_dim") or 16
    time = 2 * (_number(parts, "max_source_positions") or 32)
    for name in ("input_features", "input_values", "audio_values"):
        if name not in takes:
            continue
        mask = next((one for one in ("input_features_mask", "feature_attention_mask", "attention_mask") if one in takes), None)
        shapes = [(bins, time), (time, bins), (1, time, bins), (bins, 64), (64, bins)]
        if name != "input_features":
            shapes = [(1200,), (1, 1200), (_number(parts, "max_length") or 64, bins), *shapes]
        for shape in shapes:
            one = {name: torch.randn(EXAMPLES, *shape, generator=draw)}
            if mask is not None and "input_ids" in takes and mask != "attention_mask":
                yield one | {mask: torch.ones(EXAMPLES, max(shape), dtype=torch.long)}
            yield one


def series(model: Any, takes: Any, seed: int) -> Iterator[Batch]:
    """Series of the length in the configuration."""
    draw = torch.Generator().manual_seed(seed)
    length, channels = getattr(model.config, "context_length", 32), getattr(model.config, "num_input_channels", 1)
    yield {"past_values": torch.randn(EXAMPLES, length, channels, generator=draw)}
    yield {"past_values": torch.randn(EXAMPLES, length, generator=draw)}
