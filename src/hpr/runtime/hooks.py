"""Run any model: move batches to its device, set evaluation mode, and capture hidden states."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.utils import send_to_device
from jaxtyping import Float
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from hpr.anatomy.lookup import module_at
from hpr.errors import HprError
from hpr.runtime.batch import POSITIONAL, Batch, BatchLike, as_batch


@contextmanager
def transformers_quiet() -> Iterator[None]:
    """Silence the progress bars and warnings of transformers inside the ``with`` block. Errors are still logged."""
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
def no_warnings() -> Iterator[None]:
    """Keep back warnings of every package, logged ones too, inside the ``with`` block. Errors are still logged."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode and switch off the gradients of parameters; restore both at the end."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    try:
        with torch.enable_grad(), eval_mode(model):
            yield
    finally:
        forget_computed(model)  # what hangs on a graph cannot be copied
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def run(model: nn.Module, batch: Batch) -> Any:
    """The model's output for a batch. Passes inputs by keyword, or as one argument if ``POSITIONAL`` is the only input."""
    return model(batch[POSITIONAL]) if batch.keys() == {POSITIONAL} else model(**batch)


def to_device_of(batch: BatchLike, model: nn.Module) -> Batch:
    """The batch as a mapping (see ``as_batch``), on the device of the model's first parameter."""
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return send_to_device(as_batch(batch), device)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Set evaluation mode; restore the mode of each module at the end."""
    training = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in training:
            module.training = flag


def forget_computed(model: nn.Module) -> None:
    """Let modules give up what they have computed from weights that changed since; the mode of each module stays.

    Levit keeps its attention biases so. Such modules give up the values when they are put into training mode.
    """
    with eval_mode(model):  # restores the modes
        model.train()


def configs_of(model: nn.Module) -> list[Any]:
    """The configurations of a model and of all modules in it, each once."""
    configs = (getattr(module, "config", None) for module in model.modules())
    return list({id(config): config for config in configs if config is not None}.values())


@contextmanager
def uncached(model: nn.Module) -> Iterator[None]:
    """Switch off the caches of keys, values and states in every configuration of the model; restore the settings at the end."""
    chosen = [(config, config.use_cache) for config in configs_of(model) if hasattr(config, "use_cache")]
    try:
        for config, _ in chosen:
            config.use_cache = False
        yield
    finally:
        for config, setting in chosen:
            config.use_cache = setting


@contextmanager
def captured_hidden_states(model: nn.Module, paths: Sequence[str]) -> Iterator[dict[str, Float[Tensor, "*batch d"]]]:
    """Path of a layer → its output hidden states in the last forward pass inside the ``with`` block."""
    states: dict[str, Tensor] = {}

    def note(path: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            states[path] = output if isinstance(output, Tensor) else output[0]

        return hook

    handles = [module_at(model, path).register_forward_hook(note(path)) for path in paths]
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def run_noting(
    model: nn.Module, batch: Batch, modules: Iterable[nn.Module], note: Callable[[nn.Module, tuple, dict[str, Any]], None]
) -> None:
    """Run a model once, and call ``note`` with each of some modules and its arguments, before the module computes."""
    handles = [module.register_forward_pre_hook(note, with_kwargs=True) for module in modules]
    try:
        with torch.no_grad(), eval_mode(model):
            run(model, batch)
    finally:
        for handle in handles:
            handle.remove()


def entering(args: tuple, kwargs: Mapping[str, Any]) -> Float[Tensor, "*batch d"]:
    """The input hidden states of a block: its first floating-point argument.

    ``args`` and ``kwargs`` are the arguments of the call. Raises ``HprError`` if no argument is floating-point.
    """
    for value in (*args, kwargs.get("hidden_states"), *kwargs.values()):
        if isinstance(value, Tensor) and value.is_floating_point():
            return value
    raise HprError("a block is called without hidden states: use blocks that take and return them, as layer features need")
