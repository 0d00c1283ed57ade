"""See that nothing reads a placeholder: code that takes a weight past its module would compute with it without a word."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hpr.errors import HprError
from hpr.nn.site import BankReader
from hpr.profiling.first_pass import readable_part
from hpr.runtime.batch import Batch
from hpr.runtime.hooks import eval_mode, run, to_device_of

_EXAMPLES = 2


def check_reads(student: nn.Module, batch: Batch) -> None:
    """Run a shared model on a few examples while its placeholders hold no number.

    Raises ``HprError``, with the path of the site, if an output is not finite then but is otherwise.
    """
    readers = [module for module in student.modules() if isinstance(module, BankReader)]
    with torch.no_grad(), eval_mode(student):
        few, _ = readable_part(student, to_device_of(batch, student), _EXAMPLES)
        if not readers or _finite(student, few, readers) or not _finite(student, few, ()):
            return
        path = next((reader.path for reader in readers if not _finite(student, few, (reader,))), readers[0].path)
    raise HprError(
        f"{path} is read past its module by code that HPR did not find, so sharing it would give wrong outputs: leave it out "
        f"(`only=`)"
    )


def _finite(student: nn.Module, batch: Batch, emptied: Sequence[BankReader]) -> bool:
    with _without_numbers(emptied):
        return all(bool(torch.isfinite(part).all()) for part in _floats(run(student, batch)))


@contextmanager
def _without_numbers(readers: Sequence[BankReader]) -> Iterator[None]:
    buffers = [
        buffer for reader in readers for name in reader.placeholders if (buffer := reader._buffers.get(name)) is not None
    ]
    kept = [buffer.clone() for buffer in buffers]
    try:
        for buffer in buffers:
            if buffer.is_floating_point():
                buffer.fill_(torch.nan)
        yield
    finally:
        for buffer, before in zip(buffers, kept, strict=True):
            buffer.copy_(before)


def _floats(outputs: Any) -> Iterator[Tensor]:
    """The floating-point tensors among a model's outputs."""
    values = outputs.values() if isinstance(outputs, Mapping) else outputs if isinstance(outputs, tuple) else (outputs,)
    yield from (value for value in values if isinstance(value, Tensor) and value.is_floating_point())
