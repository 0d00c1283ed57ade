"""Every architecture of Transformers against what HPR promises, on tiny random models: the table of docs/families.md.

No family is known to the library, and none to this script: the auto classes of Transformers list the models, and
``common.tiny_models`` builds each from its own configuration. Each model runs in a process of its own, with a limit on its time
and memory.

Run: python benchmarks/families.py --jobs 2 --rows families.jsonl > docs/families.md
A row that ``--rows`` holds already is not run again. ``--task causal_lm`` and ``--only 'Llama*'`` select some.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import multiprocessing
import os
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import transformers as tf
import transformers.generation.utils
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

import hpr
import hpr.pipeline.steps  # what is imported here need not be imported by every process
import hpr.rounding.choice
from common.families_table import table
from common.promises import Row, check
from common.tiny_batches import NoBatch, batch_for, fitting
from common.tiny_models import tiny

SECONDS = 180  # of a processor: a model that takes longer is recorded as such
MEMORY = 6 * 2**30
LARGEST = 6_000_000  # parameters of a tiny model: what is larger was not made small
FIRST = ("causal_lm", "masked_lm", "seq_to_seq_causal_lm", "speech_seq_2_seq", "image_text_to_text")


@dataclass(frozen=True)
class Architecture:
    """A model class, the type of its configuration, and the first task whose auto class lists it."""

    name: str
    kind: str
    task: str


def architectures() -> list[Architecture]:
    """Every model class that an auto class lists, once; first one of each type of configuration, then the second of each."""
    listed = {
        name.removesuffix("_MAPPING_NAMES").removeprefix("MODEL").removeprefix("_FOR_").lower(): value
        for name, value in vars(modeling_auto).items()
        if name.startswith("MODEL") and name.endswith("_MAPPING_NAMES")
    }
    mappings = {task or "base": value for task, value in listed.items()}
    found: dict[str, Architecture] = {}
    for task in (*FIRST, *sorted(mappings.keys() - {*FIRST, "base"}), "base"):
        for kind, names in mappings[task].items():
            for name in [names] if isinstance(names, str) else names:
                found.setdefault(name, Architecture(name, kind, task))
    before: Counter[str] = Counter()
    order = {}
    for one in found.values():
        order[one.name] = before[one.kind]
        before[one.kind] += 1
    return sorted(found.values(), key=lambda one: order[one.name])


def built(architecture: Architecture) -> nn.Module:
    """The tiny model in evaluation mode, the same every time."""
    torch.manual_seed(0)
    kind = getattr(tf, architecture.name, None)
    if kind is None:
        raise ImportError(f"transformers has no {architecture.name}, though an auto class lists it")
    given = {} if "question" in architecture.task else {"num_labels": 3}
    config = tiny(kind.config_class or CONFIG_MAPPING[architecture.kind], **given)
    if architecture.task == "causal_lm" and hasattr(config, "is_decoder") and not config.is_encoder_decoder:
        config.is_decoder = True
    model = kind(config).eval()
    if config.is_encoder_decoder and model.generation_config and model.generation_config.decoder_start_token_id is None:
        model.generation_config.decoder_start_token_id = 0
    with torch.no_grad():  # fresh biases are zero and fresh norms are one: that would hide what is mixed up
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    return model


def examine(architecture: Architecture) -> dict[str, Any]:
    """One row: what came of the model, as JSON values. ``outcome`` is passes, differs, refused, crashes or not built."""
    row, record = Row(stage="build"), asdict(architecture)
    started = time.process_time()
    try:
        model = built(architecture)
        if (size := sum(parameter.numel() for parameter in model.parameters())) > LARGEST:
            raise NoBatch(f"its defaults give {size:,} parameters even when they are shrunk by name")
        row.stage = "batch"
        number = fitting(model, architecture.task)
        record["inputs"] = sorted(batch_for(model, architecture.task, number, 1))
        check(model, lambda seed: batch_for(model, architecture.task, number, seed), row)
        outcome, reason = "passes" if all(kept is not False for kept in row.kept.values()) else "differs", ""
    except (Exception, SystemExit) as error:  # one model's failure is a row of the table
        told = row.stage in ("build", "batch", "stock")
        outcome = "not built" if told else "refused" if isinstance(error, hpr.HprError) else "crashes"
        reason = f"{type(error).__name__}: {error}" if not isinstance(error, NoBatch) else str(error)
        record["where"] = _where(error)
    return record | asdict(row) | {"outcome": outcome, "reason": reason[:600], "seconds": time.process_time() - started}


def _where(error: BaseException) -> list[str]:
    """The last frames of a traceback, the innermost last."""
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    return [f"{'/'.join(Path(frame.filename).parts[-2:])}:{frame.lineno} {frame.name}" for frame in frames]


def _child(architecture: Architecture, pipe: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    pipe.send(examine(architecture))


def rows_of(chosen: list[Architecture], jobs: int) -> Iterator[dict[str, Any]]:
    """A row for each, as they come; each in a process that is ended when it takes too long."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(reversed(chosen)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            architecture = waiting.pop()
            pipe, end = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(architecture, end))
            process.start()
            end.close()
            running[pipe] = (architecture, process, time.monotonic() + 3 * SECONDS)
        ready = wait(list(running), timeout=1)
        for pipe in list(running):
            architecture, process, limit = running[pipe]
            if pipe not in ready and time.monotonic() < limit:
                continue
            record = asdict(architecture) | asdict(Row(stage="unknown")) | {"seconds": float(SECONDS)}
            if pipe in ready:
                try:
                    record = pipe.recv()
                except EOFError:  # the process died
                    process.join()
                    slow = process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
                    record |= {
                        "outcome": "too slow" if slow else "crashes",
                        "reason": f"its process ended with code {process.exitcode}",
                    }
            else:
                record |= {"outcome": "too slow", "reason": f"not done in {3 * SECONDS} seconds on a busy machine"}
            process.kill()
            process.join()
            pipe.close()
            del running[pipe]
            yield record


def main() -> None:
    """Run what has no row yet, and print the table as Markdown."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--jobs", type=int, default=1)
    arguments.add_argument("--only", default="*", help="a shell pattern of class names")
    arguments.add_argument("--task", default="*", help="a shell pattern of tasks, such as causal_lm")
    arguments.add_argument("--rows", type=Path, default=Path("families.jsonl"), help="the file of rows; those in it are kept")
    given = arguments.parse_args()
    tf.logging.set_verbosity_error()
    tf.logging.disable_progress_bar()
    torch.set_num_threads(1)
    done = [json.loads(line) for line in given.rows.read_text().splitlines()] if given.rows.exists() else []
    known, started = {row["name"] for row in done}, time.monotonic()
    chosen = [one for one in architectures() if fnmatch.fnmatch(one.name, given.only) and fnmatch.fnmatch(one.task, given.task)]
    with given.rows.open("a") as file:
        for row in rows_of([one for one in chosen if one.name not in known], given.jobs):
            done.append(row)
            file.write(json.dumps(row) + "\n")
            file.flush()
            print(f"{len(done)} {row['name']}: {row['outcome']} {row['reason'][:100]}", file=sys.stderr, flush=True)
    names = {one.name for one in chosen}
    rows = [row for row in done if row["name"] in names]
    minutes, clock = sum(row["seconds"] for row in rows) / 60, (time.monotonic() - started) / 60
    wall = "" if known else f", {clock:.0f} minutes by the clock"
    took = f"({minutes:.0f} minutes of one core{wall}, with transformers {tf.__version__} and torch {torch.__version__})"
    print(table(rows, took, len(chosen)))


if __name__ == "__main__":
    sys.exit(main())
