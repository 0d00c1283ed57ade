"""Time contestants in turns, and load each in processes of its own."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from hpr.bench import loading, quantised
from hpr.checkpoints.open import open_model
from hpr.data.loaded_model import LoadedModel
from hpr.errors import BudgetError, HprError
from hpr.evaluation.cost import file_bytes
from hpr.export.graphs import ONE, sample_batch, writes
from hpr.export.onnx import FOLDER, export_onnx
from hpr.nn.bank import bank_of
from hpr.runtime.environment import versions
from hpr.runtime.progress import progress
from hpr.timing.target import LATENCY, Target

RUNTIMES = ("torch", "onnxruntime")
SHAPES = ("1x16", "1x128", "1x512", "32x16", "32x128", "32x512")
_SECONDS, _FEWEST, _LOADS = 20.0, 3, 3  # for one shape; rounds and processes of each contestant
_PROMPT, _WRITTEN = 16, 32  # tokens
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
        return batch if self.runtime == "torch" else _for_graph(self.loaded, batch)

    def call(self, feed: Feed) -> Callable[[], Any]:
        if self.runtime == "onnxruntime":
            return lambda: self.loaded.run(None, feed)
        given = {name: torch.from_numpy(value) for name, value in feed.items()}
        return lambda: self.loaded(**given)


def bench(
    folder: Path,
    teacher: str | None = None,
    shapes: Sequence[str] | None = None,
    runtimes: Sequence[str] | None = None,
    threads: int = 1,
    rounds: int = 15,
) -> dict[str, Any]:
    """Figures of a compressed model beside its original, as JSON values: milliseconds, tokens a second, seconds, bytes.

    Raises ``HprError`` for threads, rounds, runtimes and shapes that cannot be, before anything is loaded.
    """
    wanted = _checked(shapes, runtimes, threads, rounds)
    original, student = open_model(teacher, "cpu"), open_model(folder, "cpu")
    batches, skipped = _batches(original, wanted, given=shapes is not None)
    before = torch.get_num_threads()
    result: dict[str, Any] = {"format": 1, "original": original.label, "compressed": str(folder), "left_out": skipped}
    result["machine"] = _machine(threads) | {"load_before": os.getloadavg()}
    try:
        torch.set_num_threads(threads)
        with tempfile.TemporaryDirectory(prefix="hpr-bench-") as work, torch.inference_mode():
            contestants = _contestants(original, student, teacher, folder, runtimes or RUNTIMES, Path(work), skipped)
            for one in contestants:
                if one.runtime == "torch":
                    one.loaded = loading.torch_model(one.source, one.how, threads)
                else:
                    one.loaded = loading.session(str(one.source), threads)
            rows = [_shape(name, contestants, batch, threads, rounds) for name, batch in batches.items()]
            result["latency"] = [row for several in rows for row in several]
            model: Any = original.model
            if writes(model) and not model.config.is_encoder_decoder:
                result["decode"] = _decode(contestants, model, threads)
            result["load"] = _loads(contestants, next(iter(batches.values())), threads, Path(work))
    finally:
        torch.set_num_threads(before)
    result["machine"]["load_after"] = os.getloadavg()
    return result


def _checked(shapes: Any, runtimes: Any, threads: int, rounds: int) -> list[Target]:
    cores = os.cpu_count() or 1
    if not 1 <= threads <= cores:
        raise HprError(f"threads is {threads}, and this machine has {cores} processors: give 1 to {cores}")
    if rounds < 1:
        raise HprError(f"rounds is {rounds}, fewer than 1: give at least 1")
    for name in runtimes or ():
        if name not in RUNTIMES:
            raise HprError(f"runtime {name!r:.40} is unknown: give torch, onnxruntime or both, as torch,onnxruntime")
        if name == "onnxruntime" and not _has_onnx():
            raise HprError("onnxruntime is not installed: pip install 'hpr[onnx]', or give --runtimes torch")
    return [Target(LATENCY, "1x", text) for text in (shapes or SHAPES)]


def _has_onnx() -> bool:
    return all(find_spec(name) is not None for name in ("onnx", "onnxruntime", "onnxscript"))


def _machine(threads: int) -> dict[str, Any]:
    clock = "time of the thread" if threads == 1 else "wall clock"
    machine = {"processor": platform.machine(), "cores": os.cpu_count(), "threads": threads, "clock": clock}
    return machine | {"versions": versions()}


def _batches(original: LoadedModel, wanted: Sequence[Target], given: bool) -> tuple[dict[str, Feed], list[dict[str, str]]]:
    """Inputs without padding for each shape; by default, shapes that the model has no positions for are left out."""
    batches: dict[str, Feed] = {}
    skipped = []
    config: Any = getattr(original.model, "config", None)
    most = getattr(config.get_text_config(), "max_position_embeddings", None) if config is not None else None
    for one in wanted:
        batch = sample_batch(original.model, original.tokenizer, one.examples, one.tokens)
        text = "input_ids" in batch
        if text and isinstance(most, int) and 0 < most < one.tokens:
            reason = f"shape is {one.shape}, but {type(original.model).__name__} has {most} positions: give fewer tokens"
            if given:
                raise BudgetError(reason)
            skipped.append({"name": one.shape, "reason": reason})
            continue
        if "attention_mask" in batch:
            batch["attention_mask"].fill_(1)
        name = one.shape if text else f"{one.examples} examples"
        batches.setdefault(name, {key: value.numpy() for key, value in batch.items()})
    if not batches:
        raise BudgetError(f"{original.label} has {most} positions, fewer than every default shape: give --shapes 1x{most}")
    return batches, skipped


def _contestants(
    original: LoadedModel,
    student: LoadedModel,
    teacher: str | None,
    folder: Path,
    runtimes: Sequence[str],
    work: Path,
    skipped: list[dict[str, str]],
) -> list[Contestant]:
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
    if not _has_onnx():
        leave("all", "onnxruntime", "not installed: pip install 'hpr[onnx]'")
        return found
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
            except Exception as error:  # the tools and the runtime raise many kinds, bare classes among them
                leave(bits, "onnxruntime", error)
                continue
            found.append(Contestant(bits, "onnxruntime", str(small), size=_bytes(small)))
    progress("export", 2, 2)
    return found


def _bytes(graph: Path) -> int:
    return sum(file.stat().st_size for file in graph.parent.glob(f"{graph.name}*") if file.is_file())


def _for_graph(graph: Any, batch: Feed) -> Feed:
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


def _seconds(call: Callable[[], Any], threads: int) -> float:
    now = time.thread_time if threads == 1 else time.perf_counter
    start = now()
    call()
    return now() - start


def _shape(name: str, contestants: Sequence[Contestant], batch: Feed, threads: int, rounds: int) -> list[dict[str, Any]]:
    calls = [one.call(one.feed(batch)) for one in contestants]
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + _SECONDS
    for number in range(rounds + 1):
        for place in range(len(calls)) if number % 2 else reversed(range(len(calls))):
            spent = _seconds(calls[place], threads)
            if number:  # the first round warms up
                times[place].append(1000 * spent)
        progress(name, number, rounds)
        if number >= min(_FEWEST, rounds) and time.perf_counter() > end:
            break
    progress(name, rounds, rounds)
    return [{"shape": name} | row for row in _rows(contestants, times)]


def _rows(contestants: Sequence[Contestant], values: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """Median and quartiles of each contestant, and the median of its ratios to the original in the same runtime and round."""
    base = {one.runtime: own for one, own in zip(contestants, values, strict=True) if one.name == "original"}
    rows = []
    for one, own in zip(contestants, values, strict=True):
        low, median, high = np.percentile(own, (25, 50, 75))
        row = one.key | {"median": float(median), "low": float(low), "high": float(high), "rounds": len(own)}
        if one.runtime in base:
            row["ratio"] = float(np.median(np.divide(own, base[one.runtime])))
        rows.append(row)
    return rows


def _decode(contestants: Sequence[Contestant], model: Any, threads: int) -> list[dict[str, Any]]:
    """Tokens a second after a prompt, one text at a time, greedily."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _PROMPT + _WRITTEN
    prompt = min(_PROMPT, most // 2)
    count = min(_WRITTEN, most - prompt)
    ids = sample_batch(model, None, 1, prompt)["input_ids"].numpy()
    rates: list[list[float]] = [[] for _ in contestants]
    for number in range(_FEWEST + 1):
        for place, one in enumerate(contestants):
            step = _torch_steps(one.loaded) if one.runtime == "torch" else _graph_steps(one.loaded)
            token = step(ids)
            spent = 0.0
            for _ in range(count):
                given = token
                start = time.thread_time() if threads == 1 else time.perf_counter()
                token = step(given)
                spent += (time.thread_time() if threads == 1 else time.perf_counter()) - start
            if number:
                rates[place].append(count / spent)
    return _rows(contestants, rates)


def _torch_steps(model: Any) -> Callable[[np.ndarray], np.ndarray]:
    past: Any = None

    def step(ids: np.ndarray) -> np.ndarray:
        nonlocal past
        output = model(input_ids=torch.from_numpy(ids), past_key_values=past, use_cache=True)
        past = output.past_key_values
        return output.logits[:, -1:].argmax(-1).numpy()  # type: ignore[no-any-return]

    return step


def _graph_steps(graph: Any) -> Callable[[np.ndarray], np.ndarray]:
    names = [one.name for one in graph.get_outputs()]
    past: Feed = {}
    seen = 0

    def step(ids: np.ndarray) -> np.ndarray:
        nonlocal past, seen
        seen += ids.shape[1]
        own = {"input_ids": ids, "attention_mask": np.ones((1, seen), np.int64)}
        own["position_ids"] = np.arange(seen - ids.shape[1], seen)[None]
        results = dict(zip(names, graph.run(None, _for_graph(graph, own | past)), strict=True))
        past = {name.replace("present", "past_key_values"): value for name, value in results.items() if "present" in name}
        return np.asarray(results["logits"][:, -1:].argmax(-1), np.int64)

    return step


def _loads(contestants: Sequence[Contestant], batch: Feed, threads: int, work: Path) -> list[dict[str, Any]]:
    """Seconds to load and resident bytes after a call, in new processes that take turns."""
    found: list[list[Mapping[str, float]]] = [[] for _ in contestants]
    for number in range(_LOADS):
        for place, one in enumerate(contestants):
            feed = work / f"{place}.npz"
            np.savez(feed, **one.feed(batch))  # type: ignore[arg-type]
            wanted = {"runtime": one.runtime, "source": one.source, "how": one.how, "threads": threads, "feed": str(feed)}
            command = [sys.executable, "-P", loading.__file__, json.dumps(wanted)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise HprError(f"{one.name} in {one.runtime} cannot be loaded in a process of its own: {done.stderr[-300:]}")
            found[place].append(json.loads(done.stdout.splitlines()[-1]))
        progress("load", number + 1, _LOADS)
    rows = _rows(contestants, [[one["load_s"] for one in own] for own in found])
    for row, own, one in zip(rows, found, contestants, strict=True):
        row |= {key: float(np.median([each[key] for each in own])) for key in own[0] if key != "load_s"} | {"bytes": one.size}
    return rows
