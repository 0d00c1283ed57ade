"""The state of an online learner on disk: the last complete snapshot, and every batch that came after it.

The learner writes a batch to disk before it learns from it. The same batches in the same order give the same weights, so a
crash loses nothing: the learner reads the snapshot and learns from the later batches again. Every file and folder is renamed
into place, so it is complete or absent.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor, nn

from hpr.errors import CheckpointError
from hpr.healing.teacher_cache import storable
from hpr.runtime.batch import Batch
from hpr.runtime.files import parse_json
from hpr.runtime.torch_errors import does_not_fit

_WEIGHTS, _TENSORS, _NUMBERS = "weights.safetensors", "tensors.safetensors", "numbers.json"


class Journal:
    """A folder with ``snapshot-STEP`` (further ones of the same step end in ``+``) and ``batches/STEP.safetensors``."""

    def __init__(self, folder: Path):
        self.folder, self.batches = folder, folder / "batches"
        self.batches.mkdir(parents=True, exist_ok=True)
        for partial in [*folder.glob(".*.partial"), *self.batches.glob(".*.partial")]:
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()

    def note(self, step: int, batch: Batch) -> None:
        """Write a batch of tensors to disk."""
        partial = self.batches / f".{step}.{os.getpid()}.partial"
        save_file(storable(batch), partial)
        partial.replace(self.batches / f"{step:09d}.safetensors")

    def snapshot(self, step: int, model: nn.Module, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Write the whole state of the learner, and remove the batches that led to it."""
        partial = self.folder / f".snapshot.{os.getpid()}.partial"
        partial.mkdir()
        save_model(model, str(partial / _WEIGHTS))
        save_file(storable(tensors), partial / _TENSORS)
        (partial / _NUMBERS).write_text(json.dumps(dict(numbers)) + "\n", encoding="utf-8")
        name, last = f"snapshot-{step:09d}", next(reversed(self._snapshots()), None)
        if last is not None and last.name.startswith(name):  # something was changed between two batches
            name = f"{last.name}+"
        partial.rename(self.folder / name)
        for old in self._snapshots()[:-1]:
            shutil.rmtree(old)
        for path in self.batches.glob("*.safetensors"):
            if int(path.stem) <= step:
                path.unlink()

    def restore(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Load the weights of the last snapshot into the model, and return its tensors and numbers. None without a snapshot.

        Raises ``CheckpointError`` for damaged files.
        """
        found = self._snapshots()
        if not found:
            return None
        try:
            load_model(model, found[-1] / _WEIGHTS)
            tensors = load_file(found[-1] / _TENSORS)
            return tensors, parse_json((found[-1] / _NUMBERS).read_text(encoding="utf-8"))
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not does_not_fit(error):  # nobody should remove a snapshot for that
                raise
            raise CheckpointError(f"{found[-1]} is damaged ({error}): remove {self.folder} to start anew") from error

    def after(self, step: int) -> Iterator[tuple[int, Batch]]:
        """Yield the number and the batch of every step after the given one, in order."""
        for path in sorted(self.batches.glob("*.safetensors")):
            if int(path.stem) > step:
                yield int(path.stem), load_file(path)

    def _snapshots(self) -> list[Path]:
        return sorted(self.folder.glob("snapshot-*"))


def parted(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Group tensors by the part of their name before the first dot."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        first, _, rest = key.partition(".")
        found.setdefault(first, {})[rest] = value
    return found


def flat(batches: list[Batch]) -> dict[str, Tensor]:
    """Return the tensors of batches by number and name."""
    return {f"{place}.{name}": value for place, batch in enumerate(batches) for name, value in batch.items()}


def unflat(tensors: Mapping[str, Tensor]) -> list[Batch]:
    """The inverse of ``flat``."""
    found = parted(tensors)
    return [found[place] for place in sorted(found, key=int)]


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state of an optimiser as tensors, by number of the parameter and name."""
    state = optimiser.state_dict()["state"]
    return {f"{number}.{name}": torch.as_tensor(value) for number, own in state.items() for name, value in own.items()}


def set_optimiser(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of ``optimiser_tensors``, in place."""
    copies = {
        name: value.clone() for name, value in tensors.items()
    }  # in memory that torch aligns: kernels differ by alignment
    state = {int(number): own for number, own in parted(copies).items()}
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
