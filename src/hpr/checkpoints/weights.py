"""Read the weights of a folder into the class that was found for it, and say which are missing or left over."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModel

from hpr.anatomy.lookup import base_of
from hpr.checkpoints.model_class import classes_with
from hpr.checkpoints.sentence_folder import SentenceFolder
from hpr.errors import CheckpointError, HprError
from hpr.profiling.first_pass import not_finite
from hpr.runtime.batch import example_batch
from hpr.runtime.files import CONFIG, read_json
from hpr.runtime.hooks import run
from hpr.runtime.torch_errors import brief, lacks_memory
from hpr.sharing.specification import is_specification

_log = logging.getLogger(__name__)
_POOLED = "pooler_output"
_OPTIONAL = ("pooler", "masked_spec_embed", "mask_token")  # read by some heads, or in training alone
_WITHOUT_POOLER = "add_pooling_layer"  # the argument by which many classes are built without a pooler


def read_weights(kind: Any, folder: Path, shown: Path, sentence: SentenceFolder | None = None) -> nn.Module:
    """The model in a folder, in evaluation mode. ``shown``: what messages call the folder.

    A pooler that the folder lacks and that nothing reads is left out. Raises ``CheckpointError`` for weights that are damaged,
    missing or not finite, and for weights that no class takes since ``config.json`` does not name the one that has them.
    ``sentence``: what reads the model, if it is the Transformer of a sentence encoder.
    """
    model, report = _loaded(kind, folder, shown)
    if missing := sorted(report["missing_keys"]):
        needed = _needed(model, missing, sentence is not None and sentence.reads_pooler)
        if needed:
            raise CheckpointError(
                f"{shown} lacks the weight {needed[0]} ({len(needed)} missing), which {type(model).__name__} reads: its "
                f"{CONFIG} and weights do not fit; copy or save the model again"
            )
        _log.info("%s lacks %s (%d missing), which nothing here reads", shown, missing[0], len(missing))
        if _WITHOUT_POOLER in inspect.signature(type(model)).parameters and all("pooler" in key for key in missing):
            model, report = _loaded(type(model), folder, shown, **{_WITHOUT_POOLER: False})
    if unexpected := sorted(report["unexpected_keys"]):
        _name_leftover(kind is AutoModel and sentence is None, model, unexpected, folder, shown)
    _check_kinds(model, folder, shown)
    if (key := not_finite(model)) is not None:
        raise CheckpointError(f"{shown}: the weight {key} is not finite: copy or download the model again")
    return model.eval()


def _loaded(kind: Any, folder: Path, shown: Path, **options: Any) -> tuple[nn.Module, dict[str, Any]]:
    options = {"output_loading_info": True, "use_safetensors": True, "trust_remote_code": False} | options
    try:
        with _same_draws():
            model, report = kind.from_pretrained(folder, **options)
    except HprError:
        raise
    except ImportError as error:
        raise CheckpointError(needs_package(str(shown), error)) from error
    except Exception as error:  # damaged files raise a dozen kinds, ZeroDivisionError and classes of others among them
        if lacks_memory(error):  # no fault of the folder
            raise
        raise CheckpointError(
            f"{shown} cannot be loaded ({brief(error)}): copy or save it again, or check its {CONFIG}"
        ) from error
    return model, report


@contextmanager
def _same_draws() -> Iterator[None]:
    """Draw the same numbers at every load for weights that a folder lacks. The generator of the caller stays as it is."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(0)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def _check_kinds(model: nn.Module, folder: Path, shown: Path) -> None:
    """Raise for weights in whole or complex numbers, which transformers would turn into others without a word."""
    if is_specification(read_json(folder / CONFIG).get("quantization_config")):  # codes are whole numbers
        return
    floating = {name for name, parameter in model.named_parameters() if parameter.is_floating_point()}
    prefix = base_of(model)[1]
    for path in sorted(folder.glob("model*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118  # not a mapping
                kind = file.get_slice(key).get_dtype()
                if not kind.startswith(("F", "BF")) and {key, prefix + key, key.removeprefix(prefix)} & floating:
                    raise CheckpointError(
                        f"{shown}: the weight {key} is stored as {kind}, not in floating point: give the original, which no "
                        f"other tool has quantised or converted"
                    )


def _needed(model: nn.Module, missing: Sequence[str], reads_pooler: bool) -> list[str]:
    """The missing weights that the model reads."""
    optional = [key for key in missing if any(part in key for part in _OPTIONAL)]
    if len(optional) < len(missing):
        return [key for key in missing if key not in optional]
    if reads_pooler or _outputs_depend_on(model, optional):
        return optional
    return []


def _outputs_depend_on(model: nn.Module, keys: Sequence[str]) -> bool:
    """Whether outputs other than ``pooler_output`` change with these weights.

    If the model cannot be tried on an example, every head counts as a reader.
    """
    tensors = [tensor for key, tensor in model.state_dict().items() if key in keys]
    first = _outputs(model)
    for tensor in tensors:
        tensor.add_(1)
    second = _outputs(model)
    for tensor in tensors:
        tensor.sub_(1)
    if first is None or second is None:
        return base_of(model)[0] is not model
    return any(not torch.equal(first[name], second[name]) for name in first)


@torch.no_grad()
def _outputs(model: nn.Module) -> dict[str, Tensor] | None:
    """The outputs for an example without ``pooler_output``; None if the model takes more than its configuration says."""
    try:
        outputs = run(model.eval(), example_batch(model))
    except (HprError, RuntimeError, TypeError, ValueError) as error:
        if lacks_memory(error):
            raise
        return None
    return {name: value for name, value in outputs.items() if isinstance(value, Tensor) and name != _POOLED}


def _name_leftover(guessed: bool, model: nn.Module, unexpected: Sequence[str], folder: Path, shown: Path) -> None:
    """Say which weights the class does not take: an error if the class is only a guess, since a head would be lost."""
    what = f"{type(model).__name__} does not take {unexpected[0]} ({len(unexpected)} such weights) of {shown}"
    if not guessed:
        _log.warning("%s: they are left out", what)
        return
    fitting = classes_with(folder, unexpected)
    names = getattr(model.config, "architectures", None) or "none"
    mend = f'write "architectures": ["{fitting[0]}"] into {CONFIG}' if fitting else "save it from a class of transformers"
    others = f" (or {', '.join(fitting[1:])})" if fitting[1:] else ""
    raise CheckpointError(f"{what}, and {CONFIG} names no class that transformers has (architectures: {names}): {mend}{others}")


def needs_package(what: str, error: ImportError) -> str:
    """A message for a package that is not installed."""
    return f"{what} needs a package that is not installed ({brief(error)}): install it"
