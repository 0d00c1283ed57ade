"""Folders that HPR does not read, told apart by their files before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from hpr.errors import CheckpointError
from hpr.runtime.files import CONFIG, WEIGHTS, read_json
from hpr.sharing.specification import is_specification

INDEX = f"{WEIGHTS}.index.json"
_DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_decoder_layers")
_DEEPEST = 10_000  # the deepest Transformers have about a thousand layers
_LFS = b"version https://git-lfs"
_RESAVE = "load it with the library that wrote it, and save it with save_pretrained, which writes model.safetensors"
_FORMATS = {  # patterns of files that hold weights in other formats, and what these are
    "*.gguf": ("in GGUF", "give the original in safetensors, since GGUF is rounded already"),
    "*.h5": ("those of TensorFlow", _RESAVE),
    "*.msgpack": ("those of Flax", _RESAVE),
    "*.onnx": ("in ONNX, which has no modules to share", "give the PyTorch model that was exported"),
    "*.npz": ("in NumPy's format, as MLX writes it", _RESAVE),
    "*.ot": ("those of Rust", _RESAVE),
    "pytorch_model*.bin": ("pickled, and a pickle may run code when it is read", _RESAVE),
    "*.ckpt*": ("pickled, and a pickle may run code when it is read", _RESAVE),
    "*.pt*": ("pickled, and a pickle may run code when it is read", _RESAVE),
    "*.safetensors": (f"not named {WEIGHTS}", f"name the file {WEIGHTS}, or save the model with save_pretrained"),
}


def check_readable(folder: Path) -> None:
    """Raise ``CheckpointError`` for a folder that HPR does not read; the message says what it is, and the mend.

    These are adapters, pipelines of diffusers, models that others quantised, models that need code of their own, weights that
    are not in safetensors, and weights of which a part is missing.
    """
    _check_adapter(folder)
    if not (folder / CONFIG).is_file():
        raise CheckpointError(_without_config(folder))
    config = read_json(folder / CONFIG)
    _check_quantisation(folder, config)
    _check_code(folder, config)
    _check_depth(folder, config)
    _check_weights(folder)


def check_tokenizer(folder: Path) -> None:
    """Raise ``CheckpointError`` if the tokenizer of a folder needs code of its own."""
    if not (folder / "tokenizer_config.json").is_file():
        return
    config = read_json(folder / "tokenizer_config.json")
    code = _code_for(config.get("auto_map"), "AutoTokenizer")
    name = str(config.get("tokenizer_class"))
    if code and not (hasattr(transformers, name) or hasattr(transformers, name.removesuffix("Fast"))):
        raise CheckpointError(
            f"the tokenizer in {folder} needs its own code ({code}), which HPR does not run: give a tokenizer in Python, as "
            f"open_model(folder, tokenizer=...), or save the folder again with a tokenizer of transformers"
        )


def _check_adapter(folder: Path) -> None:
    file = folder / "adapter_config.json"
    if not file.is_file() and not any(folder.glob("adapter_model.*")):
        return
    config = read_json(file) if file.is_file() else {}
    kind, base = config.get("peft_type", "PEFT"), config.get("base_model_name_or_path") or "its base model"
    if (folder / CONFIG).is_file() and any(folder.glob("model*.safetensors*")):
        what = f"{folder} has a model and an adapter ({kind}) beside it, which HPR would leave out"
        mend = f"take {file.name} away to compress the model alone"
    else:
        what, mend = f"{folder} is an adapter ({kind}) and no model", "compress the base model"
    raise CheckpointError(
        f"{what}: merge it first, PeftModel.from_pretrained({base!r}, folder).merge_and_unload().save_pretrained(...), "
        f"and give what that wrote, or {mend}"
    )


def _without_config(folder: Path) -> str:
    if (folder / "model_index.json").is_file():
        return f"{folder} is a pipeline of diffusers: give the folder of one of its models, such as {folder / 'text_encoder'}"
    found = _other_weights(folder)
    held = f", and its weights ({found[0]}) are {found[1]}" if found else ""
    mend = found[2] if found else "give a folder that save_pretrained wrote"
    return f"{folder} has no {CONFIG}{held}: {mend}"


def _check_depth(folder: Path, config: Mapping[str, Any]) -> None:
    """Building a model takes time and memory for each layer, so a damaged number would not end."""
    for key in _DEPTHS:
        layers = config.get(key)
        if isinstance(layers, int) and layers > _DEEPEST:
            raise CheckpointError(f"{key} in {folder / CONFIG} is {layers:,}, above {_DEEPEST:,}: correct it")


def _check_quantisation(folder: Path, config: Mapping[str, Any]) -> None:
    described = config.get("quantization_config") or config.get("compression_config")
    if is_specification(described):
        return
    if not described and (folder / "quantize_config.json").is_file():
        described = {"quant_method": "gptq"}
    if described:
        method = described.get("quant_method", "an unnamed method") if isinstance(described, Mapping) else described
        raise CheckpointError(
            f"{folder} is quantised already ({method}): give the original, since HPR needs weights in floating point"
        )


def _check_code(folder: Path, config: Mapping[str, Any]) -> None:
    """Code of a folder's own is needed if transformers has not the model type, or not the class."""
    code = _code_for(config.get("auto_map"), "")
    listed = config.get("architectures")
    names = [str(name) for name in listed] if isinstance(listed, list) else []
    known = str(config.get("model_type")) in CONFIG_MAPPING_NAMES
    if code and not (known and (not names or any(hasattr(transformers, name) for name in names))):
        raise CheckpointError(
            f"{folder} needs its own code ({code}), which HPR does not run: give a model whose class is in transformers "
            f"(model_type is {config.get('model_type')!r}, architectures {names})"
        )


def _code_for(auto_map: Any, name: str) -> str:
    """The code that an ``auto_map`` names for classes whose name has a part, in words."""
    if not isinstance(auto_map, Mapping):
        return ""
    found = [value for key, value in auto_map.items() if name in key]
    flat = [part for value in found for part in (value if isinstance(value, list) else [value])]
    return ", ".join(dict.fromkeys(str(part) for part in flat if part))


def _check_weights(folder: Path) -> None:
    files = [folder / WEIGHTS]
    if (folder / INDEX).is_file() and not files[0].is_file():
        listed = read_json(folder / INDEX).get("weight_map")
        if not listed or not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
            raise CheckpointError(f"{folder / INDEX} lists no files of weights: copy or download it again")
        files = [folder / name for name in sorted(set(listed.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(
                f"{folder} lacks {missing[0]} ({len(missing)} of {len(files)} files of weights that {INDEX} lists): copy or "
                f"download the rest"
            )
    elif not files[0].is_file():
        found = _other_weights(folder)
        if found is None:
            raise CheckpointError(f"{folder} has no {WEIGHTS}: copy or download the whole model")
        raise CheckpointError(f"the weights in {folder} ({found[0]}) are {found[1]}: {found[2]}")
    for file in files:
        with file.open("rb") as opened:
            if opened.read(len(_LFS)) == _LFS:
                raise CheckpointError(f"{file} is a pointer of Git LFS, not the weights: run git lfs pull in its repository")


def _other_weights(folder: Path) -> tuple[str, str, str] | None:
    """A file with weights in another format, what the format is, and the mend."""
    for pattern, (what, mend) in _FORMATS.items():
        if found := sorted(file.name for file in folder.glob(pattern) if file.is_file() and file.name != WEIGHTS):
            return found[0], what, mend
    return None
