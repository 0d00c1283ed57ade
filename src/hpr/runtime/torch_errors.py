"""Tell errors of torch apart, since it has no class for shapes nor for a processor's memory, and say long errors briefly."""

from __future__ import annotations

import torch

_MEMORY = ("DefaultCPUAllocator", "out of memory")
_DEVICE = "CUDA error"


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that memory is used up, of a processor or of a device.

    ``load_state_dict`` puts the text of such an error into another one, so the text counts as well as the class.

    >>> lacks_memory(MemoryError()), lacks_memory(ValueError("damaged"))
    (True, False)
    >>> lacks_memory(RuntimeError("While copying a parameter, an exception occurred : ('CUDA out of memory.',)"))
    True
    """
    said = str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in said for words in _MEMORY)


def does_not_fit(error: RuntimeError) -> bool:
    """Whether an error says that names, types or shapes do not fit. Errors of memory and of devices are others."""
    return type(error) in (RuntimeError, NotImplementedError) and not lacks_memory(error) and _DEVICE not in str(error)


def brief(error: BaseException) -> str:
    """The first sentence or line of what others say at length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0].split(". ")[0] if lines else type(error).__name__)[:200].rstrip(".: ")
