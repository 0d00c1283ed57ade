"""Files and output folders: what belongs into them besides the model, and how a new one takes the place of an old one."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from hpr.errors import HprError

CONFIG = "config.json"
MARKER = "hpr.json"  # says of weights without shared factors that hpr wrote them
_WRITTEN = ("plan.json", "metrics.json", "report.html", "README.md", MARKER)  # of an earlier run: stale beside a new model


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's ``config.json``. Raises ``HprError`` where it cannot be read."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise HprError(f"{folder / CONFIG} cannot be read ({error}): give a folder that hpr wrote") from error
    return config if isinstance(config, dict) else {}


def copy_sentence_files(source: Path, target: Path) -> None:
    """What SentenceTransformer reads besides the transformer itself; nothing where ``source`` is no sentence encoder."""
    if not (source / "modules.json").is_file():
        return
    modules = json.loads((source / "modules.json").read_text(encoding="utf-8"))
    first = source / modules[0]["path"]  # the transformer: written at the top here, in a folder of its own by old versions
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
    """Write a text file so that a crash leaves either the old file or the new one, never a part."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def replace(target: Path, complete: Path) -> None:
    """Put a complete folder in the place of the old one, which is gone only when that has worked."""
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


WEIGHTS = "model.safetensors"
