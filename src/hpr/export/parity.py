"""Whether a graph computes what the model does that it was traced from."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.exporters.utils import get_leaf_tensors

from hpr.errors import HprError

FLOATS = 1e-4  # of the largest output: what sums in another order differ by
_ZERO = 1e-3  # of the largest number of any output: an output that is about 0 is compared with this
_FATAL = 4  # the runtime's level of messages: it raises what it would print
_MEND = "this model cannot be exported as ONNX; `hpr export --to hf` writes it for torch"
INTEGERS = 5e-2  # an input that lies between two of 256 steps may be rounded to either, in every layer


def difference(file: Path, module: nn.Module, inputs: Mapping[str, Any], named: Mapping[str, str], limit: float) -> float:
    """The largest difference of an output of the graph, as a share of the largest number in it.

    ``named``: name in the graph → name of the tensor in what the module takes and returns. Raises ``HprError`` beyond
    ``limit``.
    """
    import onnxruntime

    failures = runtime_errors()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _FATAL
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except failures as error:
        raise HprError(f"{file.name} cannot be loaded ({_brief(error)}): {_MEND}") from error
    taken = get_leaf_tensors(dict(inputs))
    feed = {one.name: _leaf(taken, named[one.name]).numpy() for one in session.get_inputs()}
    try:
        results = session.run(None, feed)
    except failures as error:
        sizes = ", ".join(f"{name} {value.shape}" for name, value in feed.items() if not name.startswith("past_key_values"))
        raise HprError(f"{file.name} cannot be run with {sizes} ({_brief(error)}): {_MEND}") from error
    with torch.no_grad():
        expected = get_leaf_tensors(module(**copy.deepcopy(dict(inputs))))
    wanted = {one.name: _leaf(expected, named[one.name]).float().numpy() for one in session.get_outputs()}
    most = max((float(np.abs(one).max()) for one in wanted.values() if one.size), default=0.0)
    largest = 0.0
    for name, found in zip(wanted, results, strict=True):
        if wanted[name].shape != found.shape:
            raise HprError(f"{name} of {file.name} has shape {found.shape}, but the model gives {wanted[name].shape}: {_MEND}")
        if not found.size:
            continue
        scale = max(float(np.abs(wanted[name]).max()), _ZERO * most)
        gap = float(np.abs(wanted[name] - found.astype(np.float32)).max()) / max(scale, 1e-30)
        if not gap <= limit:
            raise HprError(
                f"{name} of {file.name} differs by {gap:.2g} of its largest number from what the model gives, and {limit:g} is "
                f"allowed: {_MEND}"
            )
        largest = max(largest, gap)
    return largest


def runtime_errors() -> tuple[type[Exception], ...]:
    """What ONNX Runtime raises for a graph that it cannot load or run; its classes have no common base of their own."""
    from onnxruntime.capi import onnxruntime_pybind11_state as errors

    return errors.Fail, errors.InvalidArgument, errors.InvalidGraph, errors.NotImplemented, errors.RuntimeException


def _brief(error: Exception) -> str:
    return f"{' '.join(str(error).split()):.200}"


def _leaf(leaves: Mapping[str, Tensor], name: str) -> Tensor:
    return leaves[name.removeprefix("input.").removeprefix("output.")].detach().cpu()
