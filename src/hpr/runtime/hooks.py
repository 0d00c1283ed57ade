"""Run any model: devices, evaluation mode, captured activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from hpr.anatomy.lookup import module_at
from hpr.errors import HprError
from hpr.runtime.batch import POSITIONAL, Batch, BatchLike, as_batch


@contextmanager
def transformers_quiet() -> Iterator[None]:
    """Silence the bars and warnings of transformers while it loads or trains; its errors stay."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without parameter gradients, everything restored afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        with torch.enable_grad(), eval_mode(model):
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def run(model: nn.Module, batch: Batch) -> Any:
    """Run a model on a batch: by keywords, or with one argument if ``POSITIONAL`` is all that the batch holds."""
    return model(batch[POSITIONAL]) if batch.keys() == {POSITIONAL} else model(**batch)


def to_device_of(batch: BatchLike, model: nn.Module) -> Batch:
    """The batch as a mapping (see ``as_batch``), on the model's device."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return send_to_device(as_batch(batch), device)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, every module's own flag restored afterwards."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag


@contextmanager
def captured_hidden_states(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Path → the hidden states that the layer there emits in the passes made inside, those of the last pass."""
    found: dict[str, Tensor] = {}

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[path] = output if isinstance(output, Tensor) else output[0]

        return hook

    handles = [module_at(model, path).register_forward_hook(note(path)) for path in paths]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def entering(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    """The hidden states that a block is given: its first floating-point argument."""
    for value in (*args, kwargs.get("hidden_states"), *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise HprError("a block is called without hidden states: layer features need blocks that take and return them")
