"""The state of an online learner on disk: the last whole snapshot, and every batch that came after it.

A batch is written down before it is learnt from. Learning from the same batches in the same order gives the same weights, so
after a crash at any point nothing is lost: the snapshot is read, and what came after it is learnt again. Every file and folder
appears by being renamed, whole or not at all.
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

from hpr.errors import HprError
from hpr.healing.teacher_cache import storable
from hpr.runtime.batch import Batch

_WEIGHTS, _TENSORS, _NUMBERS = "weights.safetensors", "tensors.safetensors", "numbers.json"


class Journal:
    """A folder with ``snapshot-STEP``, further ones of the same step with ``+`` behind it, and ``batches/STEP.safetensors``."""

    def __init__(self, folder: Path):
        self.folder, self.batches = folder, folder / "batches"
        self.batches.mkdir(parents=True, exist_ok=True)
        for partial in [*folder.glob(".*.partial"), *self.batches.glob(".*.partial")]:
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()

    def note(self, step: int, batch: Batch) -> None:
        """Write a batch of tensors down."""
        partial = self.batches / f".{step}.{os.getpid()}.partial"
        save_file(storable(batch), partial)
        partial.replace(self.batches / f"{step:09d}.safetensors")

    def snapshot(self, step: int, model: nn.Module, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Write down all that the learner is; what led there is no longer needed."""
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
        """The last snapshot: weights go into the model, tensors and numbers are returned. None where there is none yet.

        Raises ``HprError`` where files are damaged.
        """
        found = self._snapshots()
        if not found:
            return None
        try:
            load_model(model, found[-1] / _WEIGHTS)
            tensors = load_file(found[-1] / _TENSORS)
            return tensors, json.loads((found[-1] / _NUMBERS).read_text(encoding="utf-8"))
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            raise HprError(f"{found[-1]} is damaged ({error}): remove {self.folder} to start anew") from error

    def after(self, step: int) -> Iterator[tuple[int, Batch]]:
        """The batches that were written down after a step, in order."""
        for path in sorted(self.batches.glob("*.safetensors")):
            if int(path.stem) > step:
                yield int(path.stem), load_file(path)

    def _snapshots(self) -> list[Path]:
        return sorted(self.folder.glob("snapshot-*"))


def parted(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors by what stands before the first dot of their name, and what stands after it."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        first, _, rest = key.partition(".")
        found.setdefault(first, {})[rest] = value
    return found


def flat(batches: list[Batch]) -> dict[str, Tensor]:
    """Batches as tensors by number and name."""
    return {f"{place}.{name}": value for place, batch in enumerate(batches) for name, value in batch.items()}


def unflat(tensors: Mapping[str, Tensor]) -> list[Batch]:
    """The inverse of ``flat``."""
    found = parted(tensors)
    return [found[place] for place in sorted(found, key=int)]


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The state of an optimiser as tensors, by number of the parameter and name."""
    state = optimiser.state_dict()["state"]
    return {f"{number}.{name}": torch.as_tensor(value) for number, own in state.items() for name, value in own.items()}


def set_optimiser(optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of ``optimiser_tensors``, in place."""
    copies = {name: value.clone() for name, value in tensors.items()}  # where torch puts them: kernels differ by alignment
    state = {int(number): own for number, own in parted(copies).items()}
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
