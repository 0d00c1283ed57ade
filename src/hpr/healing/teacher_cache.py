"""What a teacher gives, kept on disk: epochs after the first need it no more."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from hpr.runtime.batch import Batch

LIMIT = 4e9  # bytes that all targets of a run may take; beyond that they are made anew each time
_HIDDEN = "hidden."


@dataclass(frozen=True)
class Taught:
    """A teacher's ``predictions`` (…, d) with their ``weight`` (…), and by path what its layers emitted."""

    predictions: Tensor
    weight: Tensor
    hidden: dict[str, Tensor] = field(default_factory=dict)


class Cache:
    """Targets by the content of their batch, one file each, written whole or not at all; a damaged one is made anew."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.bytes = sum(path.stat().st_size for path in folder.iterdir())

    def __call__(self, batch: Batch, make: Callable[[], Taught]) -> Taught:
        """The targets of a batch, made now if they are not there."""
        path = self.folder / f"{key_of(batch)}.safetensors"
        if path.is_file():
            try:
                return _read(path, batch)
            except (SafetensorError, KeyError):
                path.unlink()
        made = make()
        if self.bytes > LIMIT:
            return made
        tensors = {"predictions": made.predictions, "weight": made.weight}
        tensors |= {_HIDDEN + name: value for name, value in made.hidden.items()}
        half = path.with_suffix(f".{os.getpid()}")
        save_file(storable(tensors), half)
        self.bytes += half.stat().st_size
        half.replace(path)
        return made


def storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same as safetensors takes them: each by itself in memory, since several may be one tensor."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}


def key_of(batch: Batch) -> str:
    """A hash of all that a batch holds."""
    digest = hashlib.sha256()
    for name, value in sorted(batch.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path, batch: Batch) -> Taught:
    device = next(iter(batch.values())).device
    found = load_file(path, device=str(device))
    hidden = {name.removeprefix(_HIDDEN): value for name, value in found.items() if name.startswith(_HIDDEN)}
    return Taught(found["predictions"], found["weight"], hidden)
