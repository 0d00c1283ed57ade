"""Which graphs a model becomes, and the inputs that each is traced with.

A model that reads is one graph. A model that writes one token after the other has its keys and values as inputs and outputs:
one graph serves the prompt, with empty ones, and every token after it. A model with an encoder has three: the encoder, the
decoder's first step, which computes keys and values of the encoder's states, and its later steps, which read them.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.exporters.exporter_dynamo import get_auto_dynamic_shapes, register_cache_pytrees_for_model
from transformers.exporters.utils import decompose_for_generation, decompose_prefill_decode, is_multimodal

from hpr.errors import HprError
from hpr.runtime.batch import example_batch
from hpr.runtime.torch_errors import brief, lacks_memory

_OF_CACHES = (0, 2)
_STEPS = 2  # tokens that the later steps of a decoder are traced with
_OPEN = {"input_features": (0,), "pixel_values": (0,)}  # a configuration says how long sounds and how large images are
ONE = "model"
ENCODER, FIRST_STEP, LATER_STEPS = "encoder_model", "decoder_model", "decoder_with_past_model"


@dataclass(frozen=True)
class Graph:
    """``name``: of its file. ``module``: what is traced. ``inputs``: the arguments of its forward pass, a cache among them."""

    name: str
    module: nn.Module
    inputs: dict[str, Any]


def graphs_of(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> list[Graph]:
    """The graphs of a model, traced with this batch. Raises ``HprError`` for a model that writes but cannot generate."""
    if not writes(model):
        return [Graph(ONE, model, dict(batch))]
    given = {name: value for name, value in batch.items() if not name.startswith("decoder_")}
    if is_multimodal(model):
        parts = _captured(decompose_for_generation, model, given, many=True)
        return [Graph(name, module, _given(inputs)) for name, (module, inputs) in parts.items()]
    steps = _captured(decompose_prefill_decode, model, given, many=not model.config.is_encoder_decoder)
    later, first = _given(steps["decode"][1]), _given(steps["prefill"][1])
    if not model.config.is_encoder_decoder:
        if "attention_mask" in given and "attention_mask" not in later:  # generate() drops a mask without zeros
            later["attention_mask"] = nn.functional.pad(given["attention_mask"], (0, _STEPS), value=1)
        return [Graph(ONE, model, later)]
    if first["decoder_input_ids"].shape[1] == 1:  # the tracer takes the size 1 for a fixed one
        prompt = first["decoder_input_ids"].repeat(1, 2)
        steps = _captured(decompose_prefill_decode, model, given | {"decoder_input_ids": prompt}, many=False)
        later, first = _given(steps["decode"][1]), _given(steps["prefill"][1])
    encoder = model.get_encoder()
    read = {name: value for name, value in given.items() if name in inspect.signature(encoder.forward).parameters}
    return [Graph(ENCODER, encoder, read), Graph(FIRST_STEP, model, first), Graph(LATER_STEPS, model, later)]


def _captured(decompose: Any, model: PreTrainedModel, given: Mapping[str, Tensor], many: bool) -> dict[str, Any]:
    """The inputs of each step while the model writes a few tokens; ``many``: later steps read several tokens at once."""
    try:
        steps: dict[str, Any] = decompose(model, given, multi_token_decode=many)
    except RuntimeError as error:  # what transformers makes of any failure of ``generate``
        cause = error.__cause__ or error
        if lacks_memory(cause):
            raise
        raise HprError(
            f"{type(model).__name__} cannot write a few tokens, which its graphs are traced from ({brief(cause)}): mend its "
            f"generation_config, or export it with --to hf"
        ) from error
    return steps


def _given(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if value is not None}


def writes(model: nn.Module) -> bool:
    """Whether a model writes one token after the other."""
    return isinstance(model, PreTrainedModel) and model.can_generate()


def writing_modules(model: nn.Module) -> set[nn.Module]:
    """The modules that run for one token after the other: all of a model that writes, except for its encoder."""
    if not writes(model):
        return set()
    found: Any = model
    encoder = found.get_encoder() if found.config.is_encoder_decoder else None
    return set(model.modules()) - (set() if encoder is None else set(encoder.modules()))


def open_axes(graph: Graph) -> dict[str, Any]:
    """The axes of a graph's inputs that may have any size, as ``torch.export`` takes them: examples and positions.

    Of keys and values, (examples, heads, positions, d), and of inputs that are not known, all that are not found to be fixed.
    """
    register_cache_pytrees_for_model(cast(PreTrainedModel, graph.module))
    tensors = {name: value for name, value in graph.inputs.items() if not isinstance(value, bool)}  # flags are no inputs
    return {name: _open(spec, _OPEN.get(name)) for name, spec in get_auto_dynamic_shapes(tensors).items()}


def _open(spec: Any, axes: Collection[int] | None) -> Any:
    if isinstance(spec, list | tuple):
        return type(spec)(_open(one, axes) for one in spec)
    if not isinstance(spec, dict) or not all(isinstance(axis, int) for axis in spec):
        return spec
    kept = _OF_CACHES if axes is None and len(spec) == len(("examples", "heads", "positions", "d")) else axes
    return spec if kept is None else {axis: size for axis, size in spec.items() if axis in kept}


def sample_batch(model: nn.Module, tokenizer: Any = None, examples: int = 2, positions: int = 8) -> dict[str, Tensor]:
    """Random inputs to trace a model with: what its configuration says that it reads, with a mask where it takes one.

    The last three positions of the last text are padding; of a model that writes, the first three. Raises ``HprError`` if the
    configuration does not say what the model reads.
    """
    accepted = inspect.signature(model.forward).parameters
    batch = {name: _resized(value, name, examples, positions) for name, value in example_batch(model).items()}
    if "input_ids" in batch and "attention_mask" in accepted:
        mask = torch.ones_like(batch["input_ids"])
        mask[-1, slice(3) if writes(model) else slice(-3, None)] = 0
        batch["attention_mask"] = mask
    if "token_type_ids" in accepted and "token_type_ids" in getattr(tokenizer, "model_input_names", ()):
        batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    return batch


def _resized(value: Tensor, name: str, examples: int, positions: int) -> Tensor:
    """An input with so many examples, and so many positions of ids, or 500 samples of sound for each."""
    if name.endswith("input_ids") or name == "input_values":
        size = positions * (500 if name == "input_values" else 1)
        value = value.repeat(1, -(-size // value.shape[1]))[:, :size]
    return value.repeat(-(-examples // len(value)), *[1] * (value.dim() - 1))[:examples].contiguous()
