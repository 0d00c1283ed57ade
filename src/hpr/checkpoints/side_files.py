"""The files that belong to a model beside its configuration and weights: of processors, vocabularies and sentence encoders."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpr.checkpoints.sentence_folder import MODULES, sentence_folder
from hpr.errors import CheckpointError

_SIDE = ("*_config.json", "chat_template*", "*.jinja", "normalizer.json", "LICENSE*", "NOTICE*")
_OF_TOKENIZERS = (
    *("tokenizer.json", "*vocab*.json", "*vocab*.txt", "merges.txt", "added_tokens.json", "special_tokens_map.json"),
    *("*.model", "*.tiktoken", "*.spm", "*.bpe", "bpe.codes"),
)
_NOT_OF_THE_RESULT = ("adapter_config.json", "quantize_config.json")
_TEMPLATES = "additional_chat_templates"


def copy_side_files(source: Path, target: Path, tokenizer: Any | None) -> None:
    """Copy what the original in ``source`` has beside configuration and weights. Files that ``target`` has already stay.

    The original's vocabulary goes along unless ``tokenizer`` is another one. Raises ``CheckpointError`` if a module of a
    sentence encoder has its weights only in a pickled file.
    """
    sentence = sentence_folder(source)
    first = source if sentence is None else sentence.transformer
    own = tokenizer is None or str(getattr(tokenizer, "name_or_path", "")) == str(first)
    for folder in dict.fromkeys((first, source)):
        for file in _matching(folder, (*_SIDE, *(_OF_TOKENIZERS if own else ()))):
            if not (target / file.name).exists():
                shutil.copyfile(file, target / file.name)
        if (folder / _TEMPLATES).is_dir():
            shutil.copytree(folder / _TEMPLATES, target / _TEMPLATES, dirs_exist_ok=True)
    if sentence is not None:
        _copy_modules(source, target)


def _matching(folder: Path, patterns: tuple[str, ...]) -> Iterator[Path]:
    for pattern in patterns:
        for file in sorted(folder.glob(pattern)):
            if file.is_file() and file.name not in _NOT_OF_THE_RESULT:
                yield file


def _copy_modules(source: Path, target: Path) -> None:
    """Copy the modules behind the Transformer, and write ``modules.json``."""
    modules = json.loads((source / MODULES).read_text(encoding="utf-8"))
    modules[0]["path"] = ""  # old versions write the Transformer into a subfolder, the copy has it at the top
    (target / MODULES).write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")
    about = source / "config_sentence_transformers.json"
    if about.is_file():
        shutil.copyfile(about, target / about.name)
    for module in modules[1:]:
        folder = source / module["path"]
        if not module["path"] or not folder.is_dir():
            continue  # Normalize has no files
        if any(folder.glob("*.bin")) and not any(folder.glob("*.safetensors")):
            raise CheckpointError(f"{folder} has pickled weights: save the original again with a recent sentence-transformers")
        shutil.copytree(folder, target / module["path"], ignore=shutil.ignore_patterns("*.bin"), dirs_exist_ok=True)
