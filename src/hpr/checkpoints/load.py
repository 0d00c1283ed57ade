"""Load a compressed checkpoint into a module."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model
from torch import Tensor, nn

from hpr.anatomy.lookup import module_at, weight_of
from hpr.checkpoints.quantizer import HprConfig, rebuild
from hpr.checkpoints.save import check_checkpoint, check_hashes
from hpr.coding.record import Coded
from hpr.errors import CheckpointError
from hpr.nn.coded import attach_codes, split_state
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
    described = HprConfig(**config) if config is not None else None
    if described is not None and described.coded:
        return _load_coded(model, path / WEIGHTS, described)
    bank = rebuild(model, described) if described is not None else None
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


def _load_coded(model: nn.Module, file: Path, described: HprConfig) -> nn.Module:
    """Decode every stream into the weight of its name; all other tensors are plain."""
    if not file.is_file():
        raise CheckpointError(f"no weights at {file}: give a folder that hpr.save wrote")
    check_hashes([str(file)], described.coded.get("hashes", {}))
    try:
        state = load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"{file} is damaged ({error}): copy or download it again") from error
    try:
        keys = {path: key for key, path in split_state(model, described.coded["sites"])[0].items()}
        coded = {path: Coded(state.pop(keys[path]).numpy().tobytes()) for path in described.coded["sites"]}
    except KeyError as error:
        raise CheckpointError(f"{file} and {CONFIG} do not fit this {type(model).__name__}: {error} is missing") from error
    tensors = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for path, one in coded.items():
            _fill(weight_of(module_at(model, path)), one.weight(), path, file)
        for key, value in state.items():
            if key not in tensors:
                raise CheckpointError(f"{file} has {key}, which this {type(model).__name__} has not: build it as it was")
            _fill(tensors[key], value, key, file)
    filled = {tensors[key].data_ptr() for key in state} | {weight_of(module_at(model, path)).data_ptr() for path in coded}
    if missing := [key for key, tensor in tensors.items() if tensor.data_ptr() not in filled]:
        raise CheckpointError(f"{file} lacks {missing[0]}: build the {type(model).__name__} as it was when it was saved")
    attach_codes(model, coded, described.objective)
    return model


def _fill(target: Tensor, value: Tensor, name: str, file: Path) -> None:
    if target.shape != value.shape:
        shapes = f"shape {tuple(value.shape)} in {file}, {tuple(target.shape)} in the model"
        raise CheckpointError(f"{name} has {shapes}: build the model as it was when it was saved")
    target.copy_(value)
