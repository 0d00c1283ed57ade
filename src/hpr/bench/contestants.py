"""What is timed: a compressed model, its original, and the original as the tools of each runtime make it smaller."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hpr.bench import loading, quantised
from hpr.data.loaded_model import LoadedModel
from hpr.errors import HprError
from hpr.evaluation.cost import file_bytes
from hpr.export.graphs import ONE
from hpr.export.onnx import FOLDER, export_onnx
from hpr.export.parity import runtime_errors
from hpr.nn.bank import bank_of
from hpr.runtime.progress import progress
from hpr.runtime.torch_errors import lacks_memory

RUNTIMES = ("torch", "onnxruntime")
Feed = dict[str, np.ndarray]


@dataclass
class Contestant:
    """``name``: original, int8, int4, compressed … ``source``: folder or graph. ``size``: bytes on disk, if any."""

    name: str
    runtime: str
    source: str | None
    how: str = loading.AS_IT_IS
    size: int | None = None
    loaded: Any = field(default=None, repr=False)

    @property
    def key(self) -> dict[str, str]:
        return {"name": self.name, "runtime": self.runtime}

    def feed(self, batch: Feed) -> Feed:
        """The inputs that it takes; a graph of a decoder also takes positions, and empty keys and values."""
        return batch if self.runtime == "torch" else for_graph(self.loaded, batch)

    def call(self, feed: Feed) -> Callable[[], Any]:
        if self.runtime == "onnxruntime":
            return lambda: self.loaded.run(None, feed)
        given = {name: torch.from_numpy(value) for name, value in feed.items()}
        return lambda: self.loaded(**given)


def has_onnx() -> bool:
    """Whether graphs can be written and run here."""
    return all(find_spec(name) is not None for name in ("onnx", "onnxruntime", "onnxscript"))


def contestants_of(
    original: LoadedModel,
    student: LoadedModel,
    teacher: str | None,
    folder: Path,
    runtimes: Sequence[str],
    work: Path,
    skipped: list[dict[str, str]],
) -> list[Contestant]:
    """Original, int8, int4 and compressed in each runtime, the graphs in ``work``; what is left out is added to ``skipped``."""
    found = []

    def leave(name: str, runtime: str, reason: object) -> None:
        skipped.append({"name": name, "runtime": runtime, "reason": " ".join(str(reason).split())[:200]})

    size = None if original.folder is None else file_bytes(original.folder)
    if "torch" in runtimes:
        found.append(Contestant("original", "torch", teacher, size=size))
        if any(type(module) is nn.Linear for module in original.model.modules()):
            found.append(Contestant("int8", "torch", teacher, loading.INT8))
        else:
            leave("int8", "torch", "the model has no plain Linear, which is what torch quantises")
        leave("int4", "torch", "torch itself has no products in 4 bits for processors")
        found.append(Contestant("compressed", "torch", str(folder), size=file_bytes(folder)))
        if bank_of(student.model) is not None:
            found.append(Contestant(loading.COPY, "torch", str(folder), loading.COPY))
    if "onnxruntime" not in runtimes:
        return found
    if not has_onnx():
        leave("all", "onnxruntime", "not installed: pip install 'hpr[onnx]'")
        return found
    refusals: tuple[type[Exception], ...] = (TypeError, ValueError, RuntimeError, *runtime_errors())  # what the tools raise
    for number, (name, loaded) in enumerate({"original": original, "compressed": student}.items()):
        progress("export", number, 2)
        try:
            graphs = export_onnx(loaded, work / name).folder / FOLDER
        except HprError as error:
            leave(name, "onnxruntime", error)
            continue
        file = next(iter(graphs.glob(f"{ONE}*.onnx")), None)
        if file is None:
            leave(name, "onnxruntime", "the model has several graphs; only models of one graph are timed")
            continue
        found.append(Contestant(name, "onnxruntime", str(file), size=_bytes(file)))
        for bits, make in (("int8", quantised.int8), ("int4", quantised.int4)) if name == "original" else ():
            small = work / f"{bits}.onnx"
            try:
                make(file, small)
                loading.session(str(small), 1)
            except refusals as error:
                if lacks_memory(error):
                    raise
                leave(bits, "onnxruntime", error)
                continue
            found.append(Contestant(bits, "onnxruntime", str(small), size=_bytes(small)))
    progress("export", 2, 2)
    return found


def _bytes(graph: Path) -> int:
    return sum(file.stat().st_size for file in graph.parent.glob(f"{graph.name}*") if file.is_file())


def for_graph(graph: Any, batch: Feed) -> Feed:
    """The inputs that a graph takes: those of the batch, positions, and empty keys and values."""
    examples, tokens = next(iter(batch.values())).shape[:2]
    feed: Feed = {}
    for one in graph.get_inputs():
        if one.name in batch:
            feed[one.name] = batch[one.name]
        elif one.name.startswith("past_key_values."):
            feed[one.name] = np.zeros((examples, one.shape[1], 0, one.shape[3]), np.float32)
        elif one.name == "position_ids":
            feed[one.name] = np.broadcast_to(np.arange(tokens), (examples, tokens)).copy()
        elif one.name == "attention_mask":
            feed[one.name] = np.ones((examples, tokens), np.int64)
        else:
            raise HprError(f"the graph takes {one.name}, which is unknown here: give --runtimes torch")
    return feed
