"""From JSON lines to batches for an online learner, and the log of what it did with them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from hpr.data.batches import labelled, text_batches
from hpr.data.loaded_model import LoadedModel
from hpr.data.tables import LONE_SURROGATE, as_label
from hpr.data.targets import own_answers
from hpr.errors import HprError
from hpr.healing.online.healer import Update
from hpr.runtime.batch import Batch
from hpr.runtime.files import write_text

LONGEST = 256  # tokens of a text
_LOG = "updates.jsonl"


class Chunk(NamedTuple):
    """A batch of some lines, the faults of lines that are left out, and the number of the last line."""

    batch: Batch
    faults: list[str]
    line: int


def chunks(
    lines: Iterable[str],
    loaded: LoadedModel,
    size: int = 16,
    labels: bool = False,
    after: int = 0,
    fields: tuple[str, str] = ("text", "label"),
) -> Iterator[Chunk]:
    """Yield a batch for every ``size`` lines, and skip the first ``after`` lines.

    A line is an object with a ``text``, and a ``label`` if labels count; ``fields`` gives other names for these two. If no line
    of a batch can be read, the batch is empty, and a learner refuses it. Raises ``HprError`` for a model without a tokenizer.

    >>> for chunk in chunks(open("stream.jsonl"), open_model("path/to/model")):
    ...     healer.update(chunk.batch)
    """
    if loaded.tokenizer is None:
        raise HprError(
            f"{loaded.label} has no tokenizer, so it cannot read text: use hpr.extras.OnlineHealer with batches of inputs"
        )
    incoming = islice(lines, after, None)
    while chunk := list(islice(incoming, size)):
        texts, marks, faults = [], [], []
        for number, line in enumerate(chunk, after + 1):
            try:
                text, mark = _read(line, number, labels, *fields)
            except HprError as error:
                faults.append(str(error))
            else:
                texts.append(text)
                marks.append(mark)
        after += len(chunk)
        yield Chunk(_batch(texts, marks if labels else None, loaded), faults, after)


class Log:
    """One JSON line per update, with the number of the last line that it took, in the folder of the state.

    ``line``: the last line that the learner at this step has taken. A crash can lose the log of one update at most, of ``size``
    lines.
    """

    def __init__(self, folder: Path, step: int, size: int):
        self.path = folder / _LOG
        text = self.path.read_text(encoding="utf-8") if self.path.is_file() else ""
        rows = [row for line in text.splitlines() if (row := _row(line)) is not None and row["step"] <= step]
        write_text(self.path, "".join(f"{json.dumps(row)}\n" for row in rows))
        last = rows[-1] if rows else {"step": 0, "line": 0}
        self.line = int(last["line"] + (step - last["step"]) * size)

    def add(self, update: Update, line: int) -> None:
        """Append an update. Fields that are None or False are left out."""
        row = {name: value for name, value in vars(update).items() if value is not None and value is not False}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row | {"line": line}) + "\n")


def _read(line: str, number: int, labels: bool, field: str, label: str) -> tuple[str, float]:
    try:
        row: Any = json.loads(line)
        text = row[field]
    except (ValueError, KeyError, TypeError) as error:
        raise HprError(f"line {number} is no JSON object with a field {field!r}") from error
    if not isinstance(text, str) or not text.strip() or LONE_SURROGATE.search(text):
        raise HprError(f"line {number}: {field!r} is {text!r:.40}, not a text")
    return text, as_label(row.get(label), f"line {number}, field {label!r}") if labels else 0


def _batch(texts: list[str], labels: list[float] | None, loaded: LoadedModel) -> Batch:
    if not texts:
        return {}
    batches = text_batches(texts, loaded.tokenizer, len(texts), LONGEST, ratio=math.inf)
    (batch,) = batches if labels is None else labelled(batches, labels)
    return {**batch, "labels": own_answers(loaded.model, batch)} if loaded.goal.writes_targets else batch


def _row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
        return row if {"step", "line"} <= row.keys() else None
    except (ValueError, AttributeError):
        return None  # half a line, from a crash
