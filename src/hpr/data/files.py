"""Read texts, labels and arrays from files. ``FORMATS`` says by suffix how: a new format is one reader and one entry."""

from __future__ import annotations

import csv
import io
import json
import logging
import math
import os
import re
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hpr.errors import DataError

_log = logging.getLogger(__name__)
TEXT_COLUMNS = ("text", "sentence")
_BETWEEN_DOCUMENTS = re.compile(r"^[ \t]*<\|endoftext\|>[ \t]*$", re.MULTILINE)
# what numpy and zipfile raise for damaged files (found by changing random bytes)
_DAMAGED = (
    OSError,
    ValueError,
    EOFError,
    TypeError,
    KeyError,
    RuntimeError,
    SyntaxError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
Source = str | os.PathLike[str]
Column = str | int | None


@dataclass(frozen=True)
class FileFormat:
    """The readers of one file format; None for what files of this format do not hold.

    ``texts(path, column)`` returns the texts, ``labels(path)`` a value for each text (None without labels), and
    ``array(path, key)`` an array whose first axis counts examples. A reader raises ``DataError`` for a damaged file; the
    callers below check what it returns.
    """

    texts: Callable[[Source, Column], list[str]] | None = None
    labels: Callable[[Source], list[Any] | None] | None = None
    array: Callable[[Source, str | None], np.ndarray] | None = None


def format_of(path: Source) -> FileFormat:
    """The entry in ``FORMATS`` for a file's suffix, or plain text for any other suffix."""
    return FORMATS.get(Path(path).suffix.lower(), PLAIN)


def read_texts(path: Source, column: Column = None) -> list[str]:
    """Texts of a file: one a line (empty lines skipped), ``.jsonl`` with a ``text`` field, or a column of ``.csv`` or ``.tsv``.

    If lines of ``<|endoftext|>`` separate documents, each document is one text with its line breaks.

    ``column`` is a name in the first row, the field of a ``.jsonl``, or a number from 0 for a table without a header; without
    it the column ``text`` or ``sentence`` is taken, or the only one. Raises ``DataError`` for a missing, empty or
    undecodable file and for lines that do not hold what they should, by number.
    """
    reader = format_of(path).texts
    if reader is None:
        raise DataError(f"{path} holds an array, not texts: use hpr.data.files.read_array")
    texts = [text.strip() for text in reader(path, column) if text.strip()]
    if not texts:
        raise DataError(f"{path} holds no text: at least one line is needed")
    return texts


def read_labels(path: Source) -> list[float] | None:
    """The numbers in a column ``label`` of a table, or in that field of a ``.jsonl``; None for a file without them.

    Raises ``DataError`` for what is no number.
    """
    reader = format_of(path).labels
    values = None if reader is None else reader(path)
    if values is None or all(value is None for value in values):
        return None
    return [as_label(value, number, path) for number, value in enumerate(values, 1)]


def as_label(value: Any, number: int, source: object) -> float:
    """A class number, or a score. Raises ``DataError`` for anything else."""
    try:
        score = float(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"{source}, example {number}: the label {value!r:.40} is no number") from error
    if not math.isfinite(score):
        raise DataError(f"{source}, example {number}: the label {value!r} is not finite")
    return int(score) if score.is_integer() and "." not in str(value) else score


def read_array(source: Source | np.ndarray, key: str | None = None) -> np.ndarray:
    """An array as it is, or from an ``.npy`` file, or the one named ``key`` in an ``.npz`` (its only one needs no name).

    Raises ``DataError`` for a missing or damaged file, an empty array, one without numbers, and non-finite values, by row.
    """
    if isinstance(source, np.ndarray):
        array, name = source, "the array"
    else:
        reader, name = format_of(source).array, f"{source}"
        if reader is None:
            raise DataError(f"{name} holds texts, not an array: give an .npy or .npz file")
        array = reader(source, key)
    if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
        raise DataError(f"{name} has dtype {array.dtype}: numbers of at most 64 bits are needed")
    if not array.ndim or not array.size:
        raise DataError(f"{name} has shape {array.shape}: at least one example is needed, and examples along the first axis")
    finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
    if not finite.all():
        raise DataError(f"{name}: row {int(np.argmin(finite))} is not finite ({int((~finite).sum())} such rows): remove it")
    return array


def _decoded(path: Source) -> str:
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"no file at {path}: check the path") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): give a readable file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start}: convert it to UTF-8") from error
    if not text.strip():
        raise DataError(f"{path} is empty: at least one example is needed")
    return text


def _read_lines(path: Source, column: Column) -> list[str]:
    """The documents of a plain text file, or its lines if it is not divided into documents."""
    text = _decoded(path)
    documents = _BETWEEN_DOCUMENTS.split(text.replace("\r\n", "\n"))
    return documents if len(documents) > 1 else text.splitlines()


def _read_json_texts(path: Source, column: Column) -> list[str]:
    text, field = _decoded(path), "text" if column is None else str(column)
    texts = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold other line separators
        if not line.strip():
            continue
        try:
            value = json.loads(line)[field]
        except (json.JSONDecodeError, KeyError, TypeError, IndexError) as error:
            raise DataError(f"{path}, line {number}: no JSON object with a field {field!r}") from error
        if not isinstance(value, str):
            raise DataError(f"{path}, line {number}: {field!r} is a {type(value).__name__}, not a string")
        texts.append(value)
    return texts


def _read_json_labels(path: Source) -> list[Any]:
    return [row.get("label") for row in map(json.loads, filter(str.strip, _decoded(path).split("\n")))]


def _read_column(path: Source, column: Column) -> list[str]:
    return _column(path, _table(path), column)


def _read_label_column(path: Source) -> list[str] | None:
    header, *rows = _table(path)
    return [row[header.index("label")] for row in rows] if "label" in header else None


def _table(path: Source) -> list[list[str]]:
    """Rows that are not empty. In a ``.tsv`` quotes are text like any other."""
    tabs = Path(path).suffix.lower() == ".tsv"
    lines = io.StringIO(_decoded(path), newline="")
    try:
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(lines, strict=True)
        return [row for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise DataError(f"{path} is no table ({error}): check its quotes and line ends") from error


def _column(path: Source, rows: list[list[str]], column: Column) -> list[str]:
    header = [cell.strip() for cell in rows[0]]
    if isinstance(column, int):
        index, body = column, rows
    else:
        wanted = [column] if column is not None else [name for name in TEXT_COLUMNS if name in header]
        if not wanted and len(header) == 1:
            _log.info("%s has a single column without a known name: its first row is a text, too", path)
            index, body = 0, rows
        elif not wanted or wanted[0] not in header:
            what = "" if column is None else f" {column!r}"
            raise DataError(f"{path} has no column{what}, it has {', '.join(header)}: name one, or give its number from 0")
        else:
            index, body = header.index(wanted[0]), rows[1:]
    short = next((number for number, row in enumerate(body) if not 0 <= index < len(row)), None)
    if short is not None:
        raise DataError(f"{path}: row {short + 1 + len(rows) - len(body)} has no column number {index}: check its separators")
    return [row[index] for row in body]


def _read_numpy(path: Source, key: str | None) -> np.ndarray:
    try:
        with open(path, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                return loaded
            name = loaded.files[0] if key is None and len(loaded.files) == 1 else key
            if name not in loaded.files:
                raise DataError(f"{path} has no array {name!r}, it has {', '.join(loaded.files)}: name one of these")
            return loaded[name]
    except FileNotFoundError as error:
        raise DataError(f"no file at {path}: check the path") from error
    except DataError:
        raise
    except _DAMAGED as error:
        raise DataError(f"{path} is no array file or is damaged ({error}): write it with numpy.save or savez") from error


PLAIN = FileFormat(texts=_read_lines, array=_read_numpy)  # any other suffix: text, or an array if one is asked for
_TABLE = FileFormat(texts=_read_column, labels=_read_label_column)
_NUMPY = FileFormat(array=_read_numpy)
FORMATS: dict[str, FileFormat] = {
    ".jsonl": FileFormat(texts=_read_json_texts, labels=_read_json_labels),
    ".csv": _TABLE,
    ".tsv": _TABLE,
    ".npy": _NUMPY,
    ".npz": _NUMPY,
}
