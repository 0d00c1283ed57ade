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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hpr.bench import loading
from hpr.bench.contestants import RUNTIMES, Contestant, Feed, contestants_of, for_graph, has_onnx
from hpr.checkpoints.open import open_model
from hpr.data.loaded_model import LoadedModel
from hpr.errors import BudgetError, HprError
from hpr.export.graphs import sample_batch, writes
from hpr.runtime.environment import versions
from hpr.runtime.progress import progress
from hpr.timing.target import LATENCY, Target

SHAPES = ("1x16", "1x128", "1x512", "32x16", "32x128", "32x512")
_SECONDS, _FEWEST, _LOADS = 20.0, 3, 3  # for one shape; rounds and processes of each contestant
_PROMPT, _WRITTEN = 16, 32  # tokens


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
            contestants = contestants_of(original, student, teacher, folder, runtimes or RUNTIMES, Path(work), skipped)
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
        if name == "onnxruntime" and not has_onnx():
            raise HprError("onnxruntime is not installed: pip install 'hpr[onnx]', or give --runtimes torch")
    return [Target(LATENCY, "1x", text) for text in (shapes or SHAPES)]


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


def _timed(call: Callable[[], Any], threads: int) -> tuple[Any, float]:
    """What a call returns, and its seconds: of this thread if it computes alone, so that other work does not count."""
    now = time.thread_time if threads == 1 else time.perf_counter
    start = now()
    result = call()
    return result, now() - start


def _shape(name: str, contestants: Sequence[Contestant], batch: Feed, threads: int, rounds: int) -> list[dict[str, Any]]:
    calls = [one.call(one.feed(batch)) for one in contestants]
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + _SECONDS
    for number in range(rounds + 1):
        for place in range(len(calls)) if number % 2 else reversed(range(len(calls))):
            _, spent = _timed(calls[place], threads)
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
                token, seconds = _timed(partial(step, token), threads)
                spent += seconds
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
        results = dict(zip(names, graph.run(None, for_graph(graph, own | past)), strict=True))
        past = {name.replace("present", "past_key_values"): value for name, value in results.items() if "present" in name}
        return np.asarray(results["logits"][:, -1:].argmax(-1), np.int64)

    return step


def alone(one: Contestant, feed: Feed, threads: int, work: Path) -> dict[str, float]:
    """What it takes to load a contestant and call it once in a new process: seconds, and bytes before and after.

    Raises ``HprError`` with what the process said last if it fails.
    """
    file = work / "feed.npz"
    np.savez(file, **feed)  # type: ignore[arg-type]
    wanted = {"runtime": one.runtime, "source": one.source, "how": one.how, "threads": threads, "feed": str(file)}
    command = [sys.executable, "-P", loading.__file__, json.dumps(wanted)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HprError(f"{one.name} in {one.runtime} cannot be loaded in a process of its own: {done.stderr[-300:]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _loads(contestants: Sequence[Contestant], batch: Feed, threads: int, work: Path) -> list[dict[str, Any]]:
    """Seconds to load and resident bytes after a call, in new processes that take turns."""
    found: list[list[Mapping[str, float]]] = [[] for _ in contestants]
    for number in range(_LOADS):
        for place, one in enumerate(contestants):
            found[place].append(alone(one, one.feed(batch), threads, work))
        progress("load", number + 1, _LOADS)
    rows = _rows(contestants, [[one["load_s"] for one in own] for own in found])
    for row, own, one in zip(rows, found, contestants, strict=True):
        row |= {key: float(np.median([each[key] for each in own])) for key in own[0] if key != "load_s"} | {"bytes": one.size}
    return rows
