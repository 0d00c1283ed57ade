"""From what a user has (text files, tables, arrays) to the batches that everything else reads."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np

from hpr.errors import HprError

TEXT_COLUMNS = ("text", "sentence")
_BETWEEN_DOCUMENTS = re.compile(r"^[ \t]*<\|endoftext\|>[ \t]*$", re.MULTILINE)
Source = str | os.PathLike[str]


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
