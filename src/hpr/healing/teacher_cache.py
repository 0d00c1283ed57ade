"""The teacher's outputs, kept on disk, so that the teacher runs once per batch and not once per epoch."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

LIMIT = 4e9  # bytes that all targets of a run may take; beyond that they are computed again each time
_HIDDEN = "hidden."


@dataclass(frozen=True)
class TeacherTargets:
    """A teacher's ``predictions`` (…, d) with their ``weight`` (…), and by path the hidden states after its layers."""

    predictions: Tensor
    weight: Tensor
    hidden: dict[str, Tensor] = field(default_factory=dict)


class TargetCache:
    """Targets by the number of their batch, one file each. A file appears whole or not at all; a damaged one is replaced.

    The folder must belong to one run: ``resume.check_resume`` makes sure that teacher, data and loss are the same.
    """

    def __init__(self, folder: Path, device: torch.device):
        self.folder, self.device = folder, device
        folder.mkdir(parents=True, exist_ok=True)
        self.bytes = sum(path.stat().st_size for path in folder.iterdir())

    def __call__(self, number: int, make: Callable[[], TeacherTargets]) -> TeacherTargets:
        """Return the targets of a batch, and make them if there is no file yet."""
        path = self.folder / f"{number:06d}.safetensors"
        if path.is_file():
            try:
                return self._read(path)
            except (SafetensorError, KeyError):
                path.unlink()
        made = make()
        if self.bytes > LIMIT:
            return made
        tensors = {"predictions": made.predictions, "weight": made.weight}
        tensors |= {_HIDDEN + name: value for name, value in made.hidden.items()}
        partial = path.with_suffix(f".{os.getpid()}")
        save_file(storable(tensors), partial)
        self.bytes += partial.stat().st_size
        partial.replace(path)
        return made

    def _read(self, path: Path) -> TeacherTargets:
        tensors = load_file(path, device=str(self.device))
        hidden = {name.removeprefix(_HIDDEN): value for name, value in tensors.items() if name.startswith(_HIDDEN)}
        return TeacherTargets(tensors["predictions"], tensors["weight"], hidden)


def storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that safetensors accepts: on the CPU, contiguous, and without shared memory."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
