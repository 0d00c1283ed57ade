"""From what a user has (text files, tables, arrays) to the batches that everything else reads."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hpr.errors import HprError

TEXT_COLUMNS = ("text", "sentence")
_BETWEEN_DOCUMENTS = re.compile(r"^[ \t]*<\|endoftext\|>[ \t]*$", re.MULTILINE)
Source = str | os.PathLike[str]


class Batches(list):
    """A list of batches. ``order[i]`` is the place in the user's data of the i-th example, counted through all batches."""

    def __init__(self, batches: Iterable[Any], order: Sequence[int]):
        super().__init__(batches)
        self.order = list(order)


def in_input_order(rows: Tensor, batches: Sequence[Any]) -> Tensor:
    """Rows that were computed batch by batch, (n, …), in the order of the user's data; unchanged for a plain list."""
    order = getattr(batches, "order", None)
    if order is None:
        return rows
    if len(order) != len(rows):
        raise HprError(f"{len(rows)} rows for batches of {len(order)} examples: give one row for each example")
    restored = torch.empty_like(rows)
    restored[torch.tensor(order, device=rows.device)] = rows
    return restored


def first_batches(batches: Sequence[Any], examples: int) -> list[Any]:
    """The batches, whole, that hold at least the first ``examples``."""
    kept, count = [], 0
    for batch in batches:
        if count >= examples:
            break
        kept.append(batch)
        count += len(next(iter(batch.values())) if isinstance(batch, Mapping) else batch)
    return kept


def text_batches(
    texts: Sequence[str],
    tokenizer: Any,
    batch_size: int = 64,
    max_length: int = 256,
    windows: int | None = None,
    labels: Sequence[float] | None = None,
    ratio: float = 2.0,
) -> Batches:
    """Tokenised batches of ``input_ids``, ``attention_mask`` and what else the tokenizer gives, int64 (batch, positions).

    A text of more than ``max_length`` tokens loses its end; or, with ``windows``, it goes on in further examples of about
    equal length, so many in all at most (``order`` then counts these). ``labels``: one for each text.

    Texts of like length stand together, so little is padded (a batch is smaller where the next text is over ``ratio`` times
    as long as its first); the batches are shuffled, always in the same way, so that any few are a fair sample. Padding is
    on the right and masked; a tokenizer without a padding token is left as it is. Raises ``HprError`` for no texts, for what
    is no string, and for a text without tokens.
    """
    if isinstance(texts, str):
        raise HprError("texts is one string: give a list of strings")
    if batch_size < 1 or max_length < 1:
        raise HprError(f"batch_size {batch_size} and max_length {max_length} must both be at least 1")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise HprError(f"text {index} is a {type(text).__name__}, not a string: convert or remove it")
    if not len(texts):
        raise HprError("there are no texts: at least one is needed")
    limit = min(max_length, getattr(tokenizer, "model_max_length", max_length))
    if windows is None:
        rows = dict(tokenizer(list(texts), truncation=True, max_length=limit))
    else:
        rows = _windows(dict(tokenizer(list(texts), truncation=False, verbose=False)), limit, windows)
    lengths = [len(ids) for ids in rows["input_ids"]]
    if 0 in lengths:
        empty = lengths.index(0)
        shown = f" ({texts[empty]!r:.60})" if windows is None else ""
        raise HprError(f"text {empty}{shown} has no tokens: remove it")
    groups = _groups(lengths, batch_size, ratio)
    random.Random(0).shuffle(groups)
    padding = _padding(tokenizer)
    rows.setdefault("attention_mask", [[1] * length for length in lengths])
    rows = {key: row for key, row in rows.items() if [len(values) for values in row] == lengths}
    batches = [{key: _padded([row[i] for i in group], padding.get(key, 0)) for key, row in rows.items()} for group in groups]
    for batch, group in zip(batches, groups if labels is not None and windows is None else [], strict=False):
        batch["labels"] = torch.tensor([labels[i] for i in group])  # type: ignore[index]
    return Batches(batches, [index for group in groups for index in group])


def read_texts(path: Source, column: str | int | None = None) -> list[str]:
    """Texts of a file: one a line (empty lines skipped), ``.jsonl`` with a ``text`` field, or a column of ``.csv`` or ``.tsv``.

    Where lines of ``<|endoftext|>`` stand between documents, a document is a text, its line breaks kept.

    ``column`` is a name in the first row, the field of a ``.jsonl``, or a number from 0 for a table without a header; without
    it the column ``text`` or ``sentence`` is taken, or the only one. Raises ``HprError`` for a missing, empty or
    undecodable file and for lines that do not hold what they should, by number.
    """
    text, kind = _decoded(path), Path(path).suffix.lower()
    if kind == ".jsonl":
        texts = _json_texts(path, text, "text" if column is None else str(column))
    elif kind in (".csv", ".tsv"):
        texts = _column(path, _table(path, text), column)
    else:
        documents = _BETWEEN_DOCUMENTS.split(text.replace("\r\n", "\n"))
        texts = documents if len(documents) > 1 else text.splitlines()
    texts = [line.strip() for line in texts if line.strip()]
    if not texts:
        raise HprError(f"{path} holds no text: at least one line is needed")
    return texts


def read_labels(path: Source) -> list[float] | None:
    """The numbers in a column ``label`` of a table, or in that field of a ``.jsonl``; None for a file without them.

    Raises ``HprError`` for what is no number.
    """
    text, kind = _decoded(path), Path(path).suffix.lower()
    if kind == ".jsonl":
        found = [row.get("label") for row in map(json.loads, filter(str.strip, text.split("\n")))]
    elif kind in (".csv", ".tsv"):
        header, *rows = _table(path, text)
        found = [row[header.index("label")] for row in rows] if "label" in header else []
    else:
        return None
    if not any(value is not None for value in found):
        return None
    return [as_label(value, number, path) for number, value in enumerate(found, 1)]


def as_label(value: Any, number: int, source: object) -> float:
    """A class number, or a score. Raises ``HprError`` for anything else."""
    try:
        score = float(value)
    except (TypeError, ValueError) as error:
        raise HprError(f"{source}, example {number}: the label {value!r:.40} is no number") from error
    if not math.isfinite(score):
        raise HprError(f"{source}, example {number}: the label {value!r} is not finite")
    return int(score) if score.is_integer() and "." not in str(value) else score


def sts_pairs(path: Source) -> tuple[list[str], list[str], list[float]]:
    """First sentences, second sentences and scores of an STS benchmark ``.csv`` without a header."""
    first, second, scores = [], [], []
    for number, row in enumerate(_table(path, _decoded(path)), 1):
        try:
            one, two, score = row
            scores.append(float(score))
        except ValueError as error:
            raise HprError(f"{path}, row {number}: {row!r:.80} is not sentence, sentence, score") from error
        first.append(one)
        second.append(two)
    return first, second, scores


def labelled_tsv(path: Source) -> tuple[list[str], list[int]]:
    """Texts and class numbers of a ``.tsv`` with a header and two columns (SST-2)."""
    texts, labels = [], []
    for number, row in enumerate(_table(path, _decoded(path))[1:], 2):
        if len(row) != 2 or not row[1].strip().isdigit():
            raise HprError(f"{path}, row {number}: {row!r:.80} is not a text and a class number from 0")
        texts.append(row[0].strip())
        labels.append(int(row[1]))
    if not texts:
        raise HprError(f"{path} has no rows below its header")
    return texts, labels


def read_array(source: Source | np.ndarray, key: str | None = None) -> np.ndarray:
    """An array as it is, or from an ``.npy`` file, or the one named ``key`` in an ``.npz`` (its only one needs no name).

    Raises ``HprError`` for a missing or damaged file, an empty array, one without numbers, and non-finite values, by row.
    """
    array = source if isinstance(source, np.ndarray) else _load_array(source, key)
    name = "the array" if isinstance(source, np.ndarray) else f"{source}"
    if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
        raise HprError(f"{name} has dtype {array.dtype}: numbers of at most 64 bits are needed")
    if not array.ndim or not array.size:
        raise HprError(f"{name} has shape {array.shape}: at least one example is needed, and examples along the first axis")
    finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
    if not finite.all():
        raise HprError(f"{name}: row {int(np.argmin(finite))} is not finite ({int((~finite).sum())} such rows): remove it")
    return array


def array_batches(
    source: Source | np.ndarray, key: str | None = None, batch_size: int = 64, argument: str | None = None
) -> Batches:
    """Tensor batches of an array whose first axis counts examples, in its own order: float32, or int64 for integers.

    ``key`` names the array in an ``.npz``; ``argument`` makes each batch a keyword input of that name (``input_values``).
    """
    if batch_size < 1:
        raise HprError(f"batch_size {batch_size} must be at least 1")
    array = read_array(source, key)
    with np.errstate(over="ignore"):  # what overflows is found below
        tensor = torch.from_numpy(array.astype(np.float32 if array.dtype.kind == "f" else np.int64))
    if not torch.isfinite(tensor).all():
        raise HprError("the array has values beyond the range of float32 (3.4e38): scale it")
    parts = tensor.split(batch_size)
    return Batches(parts if argument is None else [{argument: part} for part in parts], range(len(tensor)))


def _windows(rows: Mapping[str, list[list[int]]], limit: int, most: int) -> dict[str, list[list[int]]]:
    """Rows cut into the fewest parts of at most ``limit``, as equal as they can be; the first ``most`` parts of all."""
    parts: dict[str, list[list[int]]] = {key: [] for key in rows}
    for place, ids in enumerate(rows["input_ids"]):
        if len(parts["input_ids"]) >= most:
            break
        count = -(-len(ids) // limit) or 1
        cuts = [len(ids) * number // count for number in range(count + 1)]
        for key, row in rows.items():
            parts[key] += [row[place][start:stop] for start, stop in pairwise(cuts)]
    return {key: row[:most] for key, row in parts.items()}


def _groups(lengths: Sequence[int], batch_size: int, ratio: float) -> list[list[int]]:
    """Places of texts that go into one batch, by length. A few very long ones would otherwise pad a whole batch."""
    groups: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        if not groups or len(groups[-1]) == batch_size or lengths[place] > ratio * lengths[groups[-1][0]]:
            groups.append([])
        groups[-1].append(place)
    return groups


def _padding(tokenizer: Any) -> dict[str, int]:
    """What fills up each kind of row. Without a padding token any id does, as it is masked; the end token is always valid."""
    candidates = (getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id", "unk_token_id"))
    token = next((candidate for candidate in candidates if candidate is not None), 0)
    return {"input_ids": token, "token_type_ids": getattr(tokenizer, "pad_token_type_id", 0)}


def _padded(rows: list[list[int]], value: int) -> Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def _decoded(path: Source) -> str:
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise HprError(f"no file at {path}: check the path") from error
    except OSError as error:
        raise HprError(f"{path} cannot be read ({error.strerror}): give a readable file") from error
    except UnicodeDecodeError as error:
        raise HprError(f"{path} is not UTF-8 at byte {error.start}: convert it to UTF-8") from error
    if not text.strip():
        raise HprError(f"{path} is empty: at least one example is needed")
    return text


def _json_texts(path: Source, text: str, field: str) -> list[str]:
    texts = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold other line separators
        if not line.strip():
            continue
        try:
            value = json.loads(line)[field]
        except (json.JSONDecodeError, KeyError, TypeError, IndexError) as error:
            raise HprError(f"{path}, line {number}: no JSON object with a field {field!r}") from error
        if not isinstance(value, str):
            raise HprError(f"{path}, line {number}: {field!r} is a {type(value).__name__}, not a string")
        texts.append(value)
    return texts


def _table(path: Source, text: str) -> list[list[str]]:
    """Rows that are not empty. In a ``.tsv`` quotes are text like any other."""
    tabs = Path(path).suffix.lower() == ".tsv"
    lines = io.StringIO(text, newline="")
    try:
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(lines, strict=True)
        return [row for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise HprError(f"{path} is no table ({error}): check its quotes and line ends") from error


def _column(path: Source, rows: list[list[str]], column: str | int | None) -> list[str]:
    header = [cell.strip() for cell in rows[0]]
    if isinstance(column, int):
        index, body = column, rows
    else:
        wanted = [column] if column is not None else [name for name in TEXT_COLUMNS if name in header]
        if not wanted and len(header) == 1:
            index, body = 0, rows
        elif not wanted or wanted[0] not in header:
            what = "" if column is None else f" {column!r}"
            raise HprError(f"{path} has no column{what}, it has {', '.join(header)}: name one, or give its number from 0")
        else:
            index, body = header.index(wanted[0]), rows[1:]
    short = next((number for number, row in enumerate(body) if not 0 <= index < len(row)), None)
    if short is not None:
        raise HprError(f"{path}: row {short + 1 + len(rows) - len(body)} has no column number {index}: check its separators")
    return [row[index] for row in body]


def _load_array(path: Source, key: str | None) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return loaded
            name = loaded.files[0] if key is None and len(loaded.files) == 1 else key
            if name not in loaded.files:
                raise HprError(f"{path} has no array {name!r}, it has {', '.join(loaded.files)}: name one of these")
            return loaded[name]
    except FileNotFoundError as error:
        raise HprError(f"no file at {path}: check the path") from error
    except HprError:
        raise
    except Exception as error:  # numpy and zipfile raise many kinds for damaged files
        raise HprError(f"{path} is no array file or is damaged ({error}): write it with numpy.save or savez") from error
