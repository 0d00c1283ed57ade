"""The time (milliseconds) and the peak memory (bytes) of one forward pass."""

from __future__ import annotations

import statistics
import time
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hpr.errors import HprError
from hpr.evaluation.cost import resident_bytes
from hpr.runtime.batch import Batch
from hpr.runtime.hooks import eval_mode, run, to_device_of


@dataclass(frozen=True)
class Latency:
    """Median milliseconds of one forward pass. ``ratio``: the median of student over teacher time within each pair of runs."""

    teacher_ms: float
    student_ms: float
    ratio: float


def latency(student: nn.Module, teacher: nn.Module, batch: Batch, repeats: int = 9) -> Latency:
    """The median times of a forward pass of both models, over ``repeats`` runs after one run to warm up.

    The models take turns, so that a busy machine slows both. Raises ``HprError`` for ``repeats`` below 1.
    """
    if repeats < 1:
        raise HprError(f"repeats is {repeats}, fewer than 1: give at least 1")
    times: dict[int, list[float]] = {0: [], 1: []}
    models, batch = (teacher, student), to_device_of(batch, teacher)
    with torch.no_grad(), eval_mode(teacher), eval_mode(student):
        for turn in range(-1, repeats):
            for index in (0, 1) if turn % 2 else (1, 0):  # the order alternates, because the machine may warm up or throttle
                elapsed = _seconds(models[index], batch)
                if turn >= 0:
                    times[index].append(elapsed)
    teacher_ms, student_ms = (1000 * statistics.median(times[index]) for index in (0, 1))
    ratio = statistics.median(after / before for before, after in zip(times[0], times[1], strict=True))
    return Latency(teacher_ms, student_ms, ratio)


def peak_memory(model: nn.Module, batch: Batch) -> int:
    """The peak memory of a forward pass in bytes: parameters, buffers, and the tensors of the pass that are alive at once.

    The function counts the tensors that operations return, so its result is the same on every machine and in every run. (The
    peak of a process never falls, so it cannot compare two models.) Python, the libraries, the input, and the workspace of a
    kernel are not counted.
    """
    batch = to_device_of(batch, model)
    watch = _AliveBytes(model, batch)
    with torch.no_grad(), eval_mode(model), watch:
        run(model, batch)
    return resident_bytes(model) + watch.peak


class _AliveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations create and that are still referenced, and their maximum."""

    def __init__(self, model: nn.Module, batch: Batch):
        super().__init__()
        given = [value for value in batch.values() if isinstance(value, Tensor)]
        self.storages = {self._key(tensor) for tensor in (*model.parameters(), *model.buffers(), *given)}
        self.alive = 0
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and not tensor.is_meta and self._key(tensor) not in self.storages:
                self._add(tensor)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        self.storages.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self.storages.discard(key)
        self.alive -= size

    @staticmethod
    def _key(tensor: Tensor) -> int:
        return int(tensor.untyped_storage()._cdata)


def _seconds(model: nn.Module, batch: Batch) -> float:
    """The seconds of one forward pass."""
    cuda = next((parameter.is_cuda for parameter in model.parameters()), False)
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run(model, batch)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
