"""Files and output folders: read a configuration, see whether a path can be written, and write atomically."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from hpr.errors import CheckpointError

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHT_FILES = ("*.safetensors", "onnx/*.onnx*")  # the weights of a folder, by their names in it
MARKER = "hpr.json"  # marks a folder that hpr wrote, if its weights have no shared factors
_WRITTEN = ("plan.json", "metrics.json", "report.html", "README.md", MARKER)  # out of date beside a new model


def parse_json(text: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of a JSON text; ``pairs`` makes an object of its fields.

    Raises ``ValueError`` for whatever is no JSON, lists in lists without end included.
    """
    try:
        return json.loads(text, object_pairs_hook=pairs)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(file: Path) -> dict[str, Any]:
    """The mapping in a JSON file. Raises ``CheckpointError`` if it cannot be read or holds no mapping."""
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): copy or download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, not a mapping: copy or download it again")
    return content


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Say an error of the disk inside the ``with`` block as a ``CheckpointError`` that names the target."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = "No space left" in str(error) or "quota" in str(error)
        mend = "free space there, or give a path on another disk" if full else "give another path"
        raise CheckpointError(f"{target} cannot be written ({error}): {mend}") from error


@contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """A new folder beside ``target``, made with the parents that are missing. What is left of them at the end is removed."""
    missing = [parent for parent in target.parents if not parent.exists()]
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in missing:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


def check_file(path: str | os.PathLike[str], what: str, is_one: Callable[[Path], bool]) -> None:
    """Raise ``CheckpointError`` if a file could not be written, or if one is there that is not ``what``. Leaves nothing behind.

    ``is_one`` tells whether a file is one of ``what`` (``a plan``), which may be replaced; so may an empty file.
    """
    target = Path(path)
    with writing(target):
        if target.is_dir():
            raise CheckpointError(f"{target} is a folder: give the path of a file")
        if target.is_symlink() and not target.exists():
            raise CheckpointError(f"{target} is a link to nothing: remove it, or give another path")
        if target.exists() and not target.is_file():
            raise CheckpointError(f"{target} is a device or a pipe, not a file: give the path of a file")
        if target.exists() and target.stat().st_size and not is_one(target):
            raise CheckpointError(f"{target} is there already and is not {what}: give another path, or remove it")
        with partial_folder(target) as partial:
            (partial / target.name).touch()


def resolved(path: str | os.PathLike[str]) -> Path:
    """The absolute path without links. Raises ``CheckpointError`` for a loop of links, or a home of nobody."""
    try:
        return Path(path).expanduser().resolve()
    except (OSError, RuntimeError) as error:  # pathlib says RuntimeError for both
        raise CheckpointError(f"{path} cannot be found ({error}): give another path") from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file atomically: after a crash, the file has either the old text or the new one."""
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
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
        stale = old.name in _WRITTEN or old.match("*.safetensors*") or (old.name == "onnx" and old.is_dir())
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
