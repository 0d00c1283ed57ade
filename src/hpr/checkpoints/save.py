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

from hpr.anatomy.lookup import slice_at
from hpr.anatomy.wrappers import unwrapped
from hpr.errors import CheckpointError
from hpr.nn.bank import BANK, FactorBank, bank_of
from hpr.nn.coded import coded_state, codes_of
from hpr.runtime.files import CONFIG, MARKER, WEIGHTS, copy_model_files, read_json, replace
from hpr.sharing.specification import coded_specification, is_specification, specification


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
    encoder (``modules.json``, pooling) and of a feature extractor (``preprocessor_config.json``) are copied.

    >>> hpr.save(student, folder / "out", tokenizer).name
    'out'
    """
    student = unwrapped(student)
    target = check_folder(folder)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write_model(student, partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        if source is not None:
            copy_model_files(Path(source), partial)
        for name, text in (files(partial) if callable(files) else files or {}).items():
            (partial / name).write_text(text, encoding="utf-8")
        replace(target, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def check_folder(folder: str | os.PathLike[str]) -> Path:
    """The resolved folder that ``save`` would write. Raises ``CheckpointError`` if it has content but no weights from hpr."""
    target = Path(folder).resolve()
    if target.exists() and not _may_replace(target):
        raise CheckpointError(
            f"{target} has content that is not from HPR, or weights that HPR did not write: choose another output folder, "
            f"or empty this one"
        )
    return target


def _may_replace(folder: Path) -> bool:
    """Whether a folder is empty or holds weights that hpr wrote: shared ones, or others that the marker file lists."""
    if not folder.is_dir() or not any(folder.iterdir()):
        return folder.is_dir()
    if not (folder / CONFIG).is_file():
        return False
    if is_specification(read_json(folder / CONFIG).get("quantization_config")):
        return True
    try:
        listed = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(listed) and listed == _weight_hashes(folder)


def _weight_hashes(folder: Path) -> dict[str, str]:
    return {file.name: sha256(file) for file in sorted(folder.glob("*.safetensors"))}


def sha256(path: str | os.PathLike[str]) -> str:
    """Hex digest of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_checkpoint(bank: FactorBank | None, files: Iterable[str]) -> None:
    """Raise where a file is damaged, or a factor is missing or of another shape: transformers would only warn."""
    found: dict[str, tuple[int, ...]] = {}
    names = [name for name in files if name.endswith(".safetensors")]
    for name in names:
        try:
            with safe_open(name, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118  # not a mapping
                    found[key[key.find(f"{BANK}.") :]] = tuple(file.get_slice(key).get_shape())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{name} is damaged ({error}): copy or download it again") from error
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
        student.save_pretrained(folder)
    else:
        config = {} if bank_of(student) is None else {"quantization_config": specification(student)}
        (folder / CONFIG).write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
        save_model(student, str(folder / WEIGHTS))  # tied parameters once
    if bank_of(student) is None and not codes_of(student):  # nothing in the configuration tells that these weights are hpr's
        (folder / MARKER).write_text(json.dumps(_weight_hashes(folder), indent=1) + "\n", encoding="utf-8")
    _readable(folder)


def _write_coded(student: nn.Module, folder: Path) -> None:
    """Streams in place of the weights, and a configuration that says how to read them, with the hash of every file."""
    state = coded_state(student)
    if isinstance(student, PreTrainedModel):
        fused = any(slice_at(student, path) is not None for path in codes_of(student))
        student.save_pretrained(folder, state_dict=state.tensors, save_original_format=not fused)  # experts keep one tensor
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    else:
        save_file(state.tensors, folder / WEIGHTS)
        config = {}
    config["quantization_config"] = coded_specification(student, state, _weight_hashes(folder))
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


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
