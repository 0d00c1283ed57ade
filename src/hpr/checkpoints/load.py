"""Load a compressed checkpoint into a module."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model
from torch import Tensor, nn

from hpr.anatomy.lookup import base_of, weight_named
from hpr.checkpoints.quantizer import HprConfig, rebuild
from hpr.checkpoints.save import check_checkpoint, check_hashes
from hpr.coding.pack import Pack
from hpr.coding.record import Coded
from hpr.errors import CheckpointError, check_kind
from hpr.nn.coded import attach_codes, unchained
from hpr.nn.folded import attach_folded
from hpr.runtime.files import CONFIG, WEIGHTS, read_json
from hpr.runtime.torch_errors import does_not_fit
from hpr.sharing.specification import is_specification


def load(model: nn.Module, folder: str | os.PathLike[str]) -> nn.Module:
    """Load what ``save`` wrote into a freshly built plain module of the same architecture, in place, and return it.

    Transformers models are loaded by ``from_pretrained``. Raises ``CheckpointError`` where a file is missing or damaged, or a
    parameter is missing, superfluous or of another shape.

    >>> folder = hpr.save(student, folder / "plain")
    >>> loaded = hpr.load(copy.deepcopy(model), folder)
    """
    check_kind("the model", model, nn.Module, "a module of the architecture that was saved")
    check_kind("the folder", folder, (str, os.PathLike), "a path")
    path = Path(folder)
    if not (path / CONFIG).is_file():
        raise CheckpointError(f"{path} has no {CONFIG}: give a folder that hpr wrote")
    config = read_json(path / CONFIG).get("quantization_config")
    if not is_specification(config) and config is not None:
        raise CheckpointError(f"{path / CONFIG} describes another quantisation: load it with the tool that wrote it")
    described = HprConfig(**config) if config is not None else None
    if described is not None:
        attach_folded(model, described.folded)
    bank = rebuild(model, described) if described is not None else None
    if described is not None and described.coded:
        return _load_coded(model, path / WEIGHTS, described)
    check_checkpoint(bank, [str(path / WEIGHTS)])
    try:
        load_model(model, path / WEIGHTS, strict=True)
    except RuntimeError as error:
        if not does_not_fit(error):  # lack of memory is no fault of the checkpoint
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
    prefix = base_of(model)[1]
    coded: dict[str, Coded] = {}
    pack = Pack()
    for parameter in described.coded.get("experts", ()):
        key = next((key for key in (f"{prefix}{parameter}", parameter) if key in state), parameter)
        chain = unchained(_take(state, key, file))
        coded |= {f"{parameter}.{number}": Coded(stream) for number, stream in enumerate(chain)}
    for path in described.coded["sites"]:
        key = next((key for key in (f"{prefix}{path}.weight", f"{path}.weight") if key in state), path)
        coded[path] = Coded(_take(state, key, file))
    if (packed := described.coded["pack"]) is not None:
        pack = Pack.from_bytes(_take(state, packed, file))
        coded |= {key.removesuffix(".weight").removeprefix(prefix): Coded.of(codes) for key, codes in pack.weights.items()}
    tensors = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for path, record in coded.items():
            _fill(weight_named(model, path), record.weight(), path, file)
        for key, value in (state | dict(pack.plain)).items():
            _fill(_tensor(model, tensors, key, file), value, key, file)
        for key, codes in pack.others.items():
            target = _tensor(model, tensors, key, file)
            _fill(target, codes.weight().reshape(target.shape if target.numel() == codes.values.size else (-1,)), key, file)
    filled = {tensors[key].data_ptr() for key in (*state, *pack.plain, *pack.others)}
    filled |= {weight_named(model, path).data_ptr() for path in coded}
    if missing := [key for key, tensor in tensors.items() if tensor.data_ptr() not in filled]:
        raise CheckpointError(f"{file} lacks {missing[0]}: build the {type(model).__name__} as it was when it was saved")
    attach_codes(model, coded, described.objective, pack.others)
    return model


def _take(state: dict[str, Tensor], key: str, file: Path) -> bytes:
    if key not in state:
        raise CheckpointError(f"{file} lacks {key}, which {CONFIG} lists: the two are not from one save; copy them again")
    return state.pop(key).numpy().tobytes()


def _tensor(model: nn.Module, tensors: Mapping[str, Tensor], key: str, file: Path) -> Tensor:
    if key not in tensors:
        raise CheckpointError(f"{file} has {key}, which this {type(model).__name__} has not: build it as it was")
    return tensors[key]


def _fill(target: Tensor, value: Tensor, name: str, file: Path) -> None:
    if target.shape != value.shape:
        shapes = f"shape {tuple(value.shape)} in {file}, {tuple(target.shape)} in the model"
        raise CheckpointError(f"{name} has {shapes}: build the model as it was when it was saved")
    target.copy_(value)
