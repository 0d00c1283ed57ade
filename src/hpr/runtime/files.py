"""Files and output folders: read a configuration, copy the files that belong to a model, and write atomically."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from hpr.errors import CheckpointError, HprError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
MARKER = "hpr.json"  # marks a folder that hpr wrote, if its weights have no shared factors
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")  # how sound and pictures become a model's inputs
_WRITTEN = ("plan.json", "metrics.json", "report.html", "README.md", MARKER)  # out of date beside a new model


def read_json(file: Path) -> dict[str, Any]:
    """The mapping in a JSON file. Raises ``CheckpointError`` if it cannot be read or holds no mapping."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): copy or download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not a mapping: copy or download it again")
    return content


def copy_model_files(source: Path, target: Path) -> None:
    """Copy what an original has beside weights and tokenizer: files of sentence encoders and of feature extractors.

    Files that ``target`` has already stay. Raises ``HprError`` as ``copy_sentence_files`` does.
    """
    for name in _PROCESSORS:
        if (source / name).is_file() and not (target / name).exists():
            shutil.copyfile(source / name, target / name)
    copy_sentence_files(source, target)


def copy_sentence_files(source: Path, target: Path) -> None:
    """Copy the files that SentenceTransformer reads besides the transformer. Does nothing if ``source`` is no sentence encoder.

    Raises ``HprError`` if a module of ``source`` has its weights only in a pickled file.
    """
    if not (source / "modules.json").is_file():
        return
    modules = json.loads((source / "modules.json").read_text(encoding="utf-8"))
    first = source / modules[0]["path"]  # the transformer; old versions write it into a subfolder, the copy has it at the top
    modules[0]["path"] = ""
    (target / "modules.json").write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")
    for name in ["config_sentence_transformers.json", *(file.name for file in first.glob("sentence_*_config.json"))]:
        origin = first / name if (first / name).is_file() else source / name
        if origin.is_file():
            shutil.copyfile(origin, target / name)
    for module in modules[1:]:
        folder = source / module["path"]
        if not module["path"] or not folder.is_dir():
            continue  # Normalize has no files
        if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
            raise HprError(f"{folder} has pickled weights: save the original again with a recent sentence-transformers")
        shutil.copytree(folder, target / module["path"], ignore=shutil.ignore_patterns("*.bin"), dirs_exist_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically: after a crash, the file has either the old text or the new one."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def replace(target: Path, complete: Path) -> None:
    """Move the folder ``complete`` to ``target``. An old folder at ``target`` is deleted only after the move succeeds.

    Files of the old folder that the new one lacks are copied into it, except weights and the files that describe a model.
    """
    if not target.exists():
        complete.rename(target)
        return
    for old in target.iterdir():
        stale = old.name in _WRITTEN or old.match("*.safetensors*")
        if stale or (complete / old.name).exists():
            continue
        if old.is_dir() and not old.is_symlink():
            shutil.copytree(old, complete / old.name, symlinks=True)
        else:
            shutil.copy2(old, complete / old.name, follow_symlinks=False)
    aside = target.with_name(f".{target.name}.{os.getpid()}.old")
    target.rename(aside)
    try:
        complete.rename(target)
    except OSError:
        aside.rename(target)
        raise
    shutil.rmtree(aside)
