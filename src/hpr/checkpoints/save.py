"""Save a model and the files that belong to it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file, save_model
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from hpr.anatomy.wrappers import unwrapped
from hpr.checkpoints.aligned import align_file
from hpr.checkpoints.side_files import copy_side_files
from hpr.errors import CheckpointError, check_kind
from hpr.nn.bank import BANK, FactorBank, bank_of
from hpr.nn.coded import coded_state, codes_of
from hpr.nn.folded import folded_in
from hpr.runtime.files import CONFIG, MARKER, WEIGHT_FILES, WEIGHTS, parse_json, partial_folder, replace, resolved, writing
from hpr.runtime.torch_errors import brief, does_not_fit
from hpr.sharing.specification import coded_specification, is_specification, specification, with_mend

_TEXTS = 1 << 18  # bytes that the plan, the metrics and the report take, about


def save(
    student: nn.Module,
    folder: str | os.PathLike[str],
    tokenizer: Any = None,
    files: Mapping[str, str] | Callable[[Path], Mapping[str, str]] | None = None,
    source: Path | None = None,
) -> Path:
    """Write a model and the files that belong to it into ``folder`` and return the folder.

    The folder changes all at once: after a crash the old one is there, or none. A folder with weights that hpr wrote is
    replaced, except for files of other names in it; any other folder with content raises ``CheckpointError``.

    ``files``: name → text (``plan.json``, ``README.md``), or a function that returns them when it is called with the folder
    that has the weights in it (to hash them). ``source``: the folder of the original, from which the files of a sentence
    encoder (``modules.json``, pooling), of processors, and of its tokenizer are copied.

    >>> hpr.save(student, folder / "out", tokenizer).name
    'out'
    """
    student = unwrapped(student)
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise CheckpointError(f"a {type(tokenizer).__name__} has no save_pretrained: give another tokenizer, or None")
    if not (files is None or callable(files)):
        check_kind("files", files, Mapping, "names and texts as a mapping, or a function that returns them")
        for name, text in files.items():
            check_kind(f"the text of {name!r} in files", text, str, "a string")
    target = check_folder(folder)
    with writing(target), partial_folder(target) as partial:
        _write_model(student, partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if source is not None:
            copy_side_files(Path(source), partial, tokenizer)
        for name, text in (files(partial) if callable(files) else files or {}).items():
            (partial / name).write_text(text, encoding="utf-8")
        replace(target, partial)
    return target


def check_folder(folder: str | os.PathLike[str]) -> Path:
    """The resolved folder that ``save`` would write.

    Raises ``CheckpointError`` if it has content but no weights from hpr, or if it cannot be written. Leaves nothing behind.
    """
    if not isinstance(folder, str | os.PathLike):
        raise CheckpointError(f"the output folder is {folder!r}, a {type(folder).__name__}: give a path")
    if "\0" in str(folder):
        raise CheckpointError(f"the output folder {str(folder)!r} has a zero byte in its name: give another path")
    target = resolved(folder)
    with writing(target):
        if target.exists() and not _may_replace(target):
            raise CheckpointError(
                f"{target} has content that is not from HPR, or weights that HPR did not write: choose another output folder, "
                f"or empty this one"
                if target.is_dir()
                else f"{target} is a file: choose a folder"
            )
        with partial_folder(target):
            return target


def check_output(
    model: nn.Module, folder: str | os.PathLike[str], tokenizer: Any = None, source: Path | None = None, weights: int = 0
) -> None:
    """Write all but the weights into a folder for a moment, so that what cannot be saved is said before it is computed.

    ``weights``: the bytes that the weights will take. Raises ``CheckpointError`` for a folder as ``check_folder`` does, for too
    little space, and for a configuration, a tokenizer or ties that cannot be saved.
    """
    target = check_folder(folder)
    if tokenizer is not None and not hasattr(tokenizer, "save_pretrained"):
        raise CheckpointError(
            f"the tokenizer is a {type(tokenizer).__name__}, which cannot be saved (it has no save_pretrained): give one of "
            f"transformers, such as PreTrainedTokenizerFast(tokenizer_object=...)"
        )
    with writing(target), partial_folder(target) as partial:
        if isinstance(model, PreTrainedModel):
            _check_ties(model)
            _trial("the configuration", model.config, partial)
            if model.can_generate() and model.generation_config is not None:
                _trial("the generation configuration", model.generation_config, partial)
        if tokenizer is not None:
            _trial("the tokenizer", tokenizer, partial)
        if source is not None:
            copy_side_files(source, partial, tokenizer)
        free = shutil.disk_usage(partial).free
        if free < weights + _TEXTS:
            raise CheckpointError(
                f"{target} needs about {weights + _TEXTS:,} bytes, and its disk has {free:,} left: free space there, or give "
                f"a path on another disk"
            )


def _trial(what: str, part: Any, folder: Path) -> None:
    try:
        part.save_pretrained(folder)
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:  # as configurations and tokenizers say it
        raise CheckpointError(
            f"{what} ({type(part).__name__}) cannot be saved ({error}): correct it before the model is compressed"
        ) from error


def _check_ties(model: PreTrainedModel) -> None:
    """Raise where parameters are tied that the class does not declare: transformers does not save such a model."""
    state = model.state_dict()
    try:
        remove_tied_weights_from_state_dict(state, model)
    except RuntimeError as error:
        if not does_not_fit(error):
            raise
        raise CheckpointError(
            f"this {type(model).__name__} has tied weights that its class does not declare, so it cannot be saved "
            f"({brief(error)}): name them in _tied_weights_keys, or give each module a copy of its own"
        ) from error


def _may_replace(folder: Path) -> bool:
    """Whether a folder is empty or holds weights that hpr wrote: shared ones, or others that the marker file lists."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return folder.is_dir()
    if not (folder / CONFIG).is_file():
        return False
    try:
        if is_specification(parse_json((folder / CONFIG).read_text(encoding="utf-8")).get("quantization_config")):
            return True
        listed = parse_json((folder / MARKER).read_text(encoding="utf-8"))
    except (AttributeError, OSError, ValueError):  # damaged, or of another kind: not from HPR
        return False
    return bool(listed) and listed == _weight_hashes(folder)


def mark(folder: Path) -> None:
    """Write the file by which HPR knows weights as its own whose configuration does not say so."""
    (folder / MARKER).write_text(json.dumps(_weight_hashes(folder), indent=1) + "\n", encoding="utf-8")


def _weight_hashes(folder: Path) -> dict[str, str]:
    files = [file for pattern in WEIGHT_FILES for file in sorted(folder.glob(pattern))]
    return {file.relative_to(folder).as_posix(): sha256(file) for file in files}


def sha256(path: str | os.PathLike[str]) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shapes_in(files: Iterable[str]) -> dict[str, tuple[int, ...]]:
    """The tensors in some files and their shapes. Raises ``CheckpointError`` for a damaged file."""
    found: dict[str, tuple[int, ...]] = {}
    for name in files:
        if name.endswith(".safetensors"):
            try:
                with safe_open(name, framework="pt") as file:
                    found |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118  # no mapping
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{name} is damaged ({error}): copy or download it again") from error
    return found


def check_checkpoint(bank: FactorBank | None, files: Iterable[str]) -> None:
    """Raise where a file is damaged, or a factor is missing or of another shape: transformers would only warn."""
    names = [name for name in files if name.endswith(".safetensors")]
    found = {key[key.find(f"{BANK}.") :]: shape for key, shape in shapes_in(names).items() if f"{BANK}." in key}
    if not names or bank is None:
        return
    for name, tensor in bank.factors.state_dict().items():
        shape = found.get(f"{BANK}.factors.{name}")
        if shape != tuple(tensor.shape):
            what = "is missing" if shape is None else f"has shape {shape}"
            raise CheckpointError(
                f"factor {name} {what} in {', '.join(names)}, {CONFIG} asks for {tuple(tensor.shape)}: "
                f"the two files are not from one save; save or download them again"
            )


def _write_model(student: nn.Module, folder: Path) -> None:
    if codes_of(student):
        _write_coded(student, folder)
    elif isinstance(student, PreTrainedModel):
        student.save_pretrained(folder, save_original_format=bank_of(student) is None or not has_own_names(student))
    else:
        described = bank_of(student) is not None or folded_in(student)
        config = {"quantization_config": specification(student)} if described else {}
        (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        save_model(student, str(folder / WEIGHTS))  # tied parameters once
    if bank_of(student) is not None and not codes_of(student):  # coded weights are decoded at load, whatever their place
        for file in folder.glob("*.safetensors"):
            align_file(file)
    if bank_of(student) is None and not codes_of(student):  # nothing in the configuration tells that these weights are hpr's
        mark(folder)
    _readable(folder)


def _write_coded(student: nn.Module, folder: Path) -> None:
    """Streams in place of the weights, and a configuration that says how to read them, with the hash of every file."""
    state = coded_state(student)
    if isinstance(student, PreTrainedModel):
        student.save_pretrained(folder, state_dict=state.tensors, save_original_format=not has_own_names(student))
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    else:
        save_file(state.tensors, folder / WEIGHTS)
        config = {}
    config["fusion_config"] = with_mend(config.get("fusion_config"))
    config["quantization_config"] = coded_specification(student, state, _weight_hashes(folder))
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def has_own_names(model: PreTrainedModel) -> bool:
    """Whether files of this class are written in the names of its modules, and not in those of its older files.

    Older files of some classes hold weights joined, divided or turned, as streams and placeholders cannot be.
    """
    return any(isinstance(one, WeightConverter) for one in get_model_conversion_mapping(model))


def check_hashes(files: Iterable[str], hashes: Mapping[str, str]) -> None:
    """Raise ``CheckpointError`` for a file of weights whose bytes are not those that were saved."""
    for file in files:
        if (expected := hashes.get(Path(file).name)) and sha256(file) != expected:
            raise CheckpointError(f"{file} is damaged or was changed (its SHA-256 differs): copy or download it again")


def _readable(folder: Path) -> None:
    """Weights with the rights of any new file: safetensors writes them for their owner alone."""
    mode = (folder / CONFIG).stat().st_mode
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)
