"""Tell torch's errors apart: it has no class of its own for those of shapes, nor for lack of a processor's memory."""

from __future__ import annotations

import torch


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that memory is used up, of a processor or of a device.

    >>> lacks_memory(MemoryError()), lacks_memory(ValueError("damaged"))
    (True, False)
    """
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def does_not_fit(error: RuntimeError) -> bool:
    """Whether an error says that names, types or shapes do not fit. Errors of memory and of devices are others."""
    return type(error) in (RuntimeError, NotImplementedError) and not lacks_memory(error)
