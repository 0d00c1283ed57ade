"""Time and memory of one forward pass."""

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
    """Milliseconds of one forward pass, and the median of student over teacher within each pair of runs."""

    teacher_ms: float
    student_ms: float
    ratio: float


def latency(student: nn.Module, teacher: nn.Module, batch: Batch, repeats: int = 9) -> Latency:
    """Median time of a forward pass, the two taking turns so that a busy machine slows both; one run of each to warm up.

    Raises ``HprError`` for ``repeats`` below 1.
    """
    if repeats < 1:
        raise HprError(f"repeats {repeats} must be at least 1")
    times: dict[int, list[float]] = {0: [], 1: []}
    models, batch = (teacher, student), to_device_of(batch, teacher)
    with torch.no_grad(), eval_mode(teacher), eval_mode(student):
        for turn in range(-1, repeats):
            for which in (0, 1) if turn % 2 else (1, 0):  # neither always goes second, on a warm or throttled machine
                elapsed = _seconds(models[which], batch)
                if turn >= 0:
                    times[which].append(elapsed)
    teacher_ms, student_ms = (1000 * statistics.median(times[which]) for which in (0, 1))
    ratio = statistics.median(after / before for before, after in zip(times[0], times[1], strict=True))
    return Latency(teacher_ms, student_ms, ratio)


def peak_memory(model: nn.Module, batch: Batch) -> int:
    """Bytes at the worst moment of a forward pass: parameters, buffers and every tensor alive that the pass made.

    Counted by watching the tensors that operations return, so it is the same on every machine and run, and needs no process of
    its own (a process's peak never falls, so it cannot tell two models apart). Python, libraries, the input, and what a
    single kernel takes for itself are not in it.
    """
    batch = to_device_of(batch, model)
    watch = _AliveBytes(model, batch)
    with torch.no_grad(), eval_mode(model), watch:
        run(model, batch)
    return resident_bytes(model) + watch.peak


class _AliveBytes(TorchDispatchMode):
    """Bytes of the storages that operations created and that are still referenced, and their maximum."""

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
    cuda = next((parameter.is_cuda for parameter in model.parameters()), False)
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    run(model, batch)
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
