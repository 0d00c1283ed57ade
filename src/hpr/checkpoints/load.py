"""Load a compressed checkpoint into a module."""

from __future__ import annotations

import os
from pathlib import Path

from safetensors.torch import load_model
from torch import nn

from hpr.checkpoints.quantizer import HprConfig, rebuild
from hpr.checkpoints.save import check_checkpoint
from hpr.errors import CheckpointError
from hpr.runtime.files import CONFIG, WEIGHTS, read_config
from hpr.sharing.specification import is_specification


def load(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Load what ``save`` wrote into a freshly built plain module of the same architecture, in place, and return it.

    Transformers models are loaded by ``from_pretrained``. Raises ``CheckpointError`` where a file is missing or damaged, or a
    parameter is missing, superfluous or of another shape.

    >>> folder = hpr.save(student, folder / "plain")
    >>> loaded = hpr.load(copy.deepcopy(model), folder)
    """
    path = Path(folder)
    config = read_config(path).get("quantization_config")
    if not is_specification(config) and config is not None:
        raise CheckpointError(f"{path / CONFIG} describes another quantisation: load it with the tool that wrote it")
    bank = rebuild(model, HprConfig(**config)) if config is not None else None
    check_checkpoint(bank, [str(path / WEIGHTS)])
    try:
        load_model(model, path / WEIGHTS, strict=True)
    except RuntimeError as error:
        if type(error) is not RuntimeError:  # lack of memory is no fault of the checkpoint
            raise
        raise CheckpointError(
            f"{path / WEIGHTS} does not fit this {type(model).__name__}: {error}; build it as it was"
        ) from error
    return model
