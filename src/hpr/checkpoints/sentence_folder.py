"""Folders of sentence-transformers: where their Transformer lies, the class that reads it, and the objective of their pooling.

Such a folder lists its modules in ``modules.json``. The first is the Transformer. What follows it tells what its outputs are
used for: a pooling makes embeddings of hidden states, the pooling of a sparse encoder reads logits over tokens, and a
cross-encoder reads the logits of a classifier.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hpr.errors import CheckpointError
from hpr.runtime.files import CONFIG, parse_json, read_json

MODULES = "modules.json"
EMBEDDINGS = "feature-extraction"  # the task of a Transformer whose hidden states are read
_POOLINGS = {"mean": "embedding", "cls": "cls-embedding"}
_TRANSFORMERS = ("Transformer", "MLMTransformer", "CLIPModel")
_TASKS = {"MLMTransformer": "fill-mask"}  # the task of old module types that fix it


@dataclass(frozen=True)
class SentenceFolder:
    """``transformer``: the folder of the Transformer. ``task``: as sentence-transformers names it.

    ``objective``: that of the pooling; None if the Transformer is read through a head, whose class has an objective.
    ``reads_pooler``: whether ``pooler_output`` is the output that is read.
    """

    transformer: Path
    task: str
    objective: str | None
    reads_pooler: bool

    @property
    def headless(self) -> bool:
        """Whether the hidden states are read, and no head."""
        return self.task == EMBEDDINGS


def sentence_folder(folder: Path) -> SentenceFolder | None:
    """What ``modules.json`` says; None for a folder without it.

    Raises ``CheckpointError`` if the file is damaged, or if the first module is no Transformer or needs code of its own.
    """
    if not (folder / MODULES).is_file():
        return None
    try:
        modules = parse_json((folder / MODULES).read_text(encoding="utf-8"))
        types = [str(part["type"]) for part in modules]
        outside = [part["path"] for part in modules if not _is_inside(PurePosixPath(part["path"]))]
        transformer = folder / modules[0]["path"]
        pooled = len(modules) > 1 and _name(types[1]) == "Pooling"  # behind anything else it reads no hidden states
        pooling = folder / modules[1]["path"] / CONFIG if pooled else None
        mode = _pooling_mode(parse_json(pooling.read_text(encoding="utf-8"))) if pooling else ""
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(f"{folder} is no complete sentence encoder ({error}): copy or download it again") from error
    if outside:
        raise CheckpointError(f"{folder / MODULES} names {outside[0]!r}, which lies outside the folder: correct the path")
    for kind in types:
        if kind.partition(".")[0] != "sentence_transformers":
            raise CheckpointError(
                f"{folder} needs its own code ({kind} in {MODULES}), which HPR does not run: give a model of the modules of "
                f"sentence-transformers"
            )
    first = _name(types[0])
    if first not in _TRANSFORMERS:
        raise CheckpointError(
            f"the first module in {folder / MODULES} is a {first}, not a Transformer: give a sentence encoder that begins with "
            f"one, or the folder of the Transformer inside"
        )
    settings = _settings(transformer)
    task = _TASKS.get(first) or str(settings.get("transformer_task", EMBEDDINGS))
    objective = _POOLINGS.get(mode, "hidden") if task == EMBEDDINGS else None
    return SentenceFolder(transformer, task, objective, "pooler_output" in json.dumps(settings.get("modality_config")))


def _is_inside(path: PurePosixPath) -> bool:
    return not path.is_absolute() and ".." not in path.parts


def _name(kind: str) -> str:
    """The class in a module type; its module has moved in the course of versions."""
    return kind.rpartition(".")[2]


def _settings(transformer: Path) -> dict[str, Any]:
    """The Transformer's own settings; versions before 5 write no task into them."""
    for file in sorted(transformer.glob("sentence_*_config.json")):
        if settings := read_json(file):
            return settings
    return {}


def _pooling_mode(config: dict[str, Any]) -> str:
    """``mean``, ``cls``, …; several at once, which no objective covers, are joined."""
    if "pooling_mode" in config:
        mode = config["pooling_mode"]
        return mode if isinstance(mode, str) else "+".join(mode)
    marks = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    return "+".join(marks.get(key, key) for key, value in config.items() if key.startswith("pooling_mode_") and value is True)
