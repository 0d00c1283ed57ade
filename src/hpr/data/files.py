"""Read texts, labels and arrays from files. ``FORMATS`` maps the suffix of a file to its readers.

A new format is one reader and one entry. Error messages and the help of ``--data`` list the suffixes by ``suffixes``.
"""

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
from typing import Any, Literal

import numpy as np
from jaxtyping import Shaped

from hpr.errors import DataError

_log = logging.getLogger(__name__)
TEXT_COLUMNS = ("text", "sentence")
_BETWEEN_DOCUMENTS = re.compile(r"^[ \t]*<\|endoftext\|>[ \t]*$", re.MULTILINE)
# the errors that numpy and zipfile raise for damaged files (collected by changing random bytes)
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
    """The readers of one file format. A reader is None if files of this format cannot hold its kind of data.

    ``texts(path, column)`` returns the texts. ``labels(path)`` returns one value for each text, or None for a file without
    labels. ``array(path, key)`` returns an array whose first axis counts examples. A reader raises ``DataError`` for a damaged
    file. The functions below check the values that a reader returns.
    """

    texts: Callable[[Source, Column], list[str]] | None = None
    labels: Callable[[Source], list[Any] | None] | None = None
    array: Callable[[Source, str | None], np.ndarray] | None = None


def format_of(path: Source) -> FileFormat:
    """The entry in ``FORMATS`` for the suffix of a file.

    Raises ``DataError`` for a suffix without an entry, because HPR would read such a file as lines of text by mistake.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in FORMATS:
        if not os.path.exists(path):
            raise DataError(f"no file at {path}: check the path")
        raise DataError(
            f"{path} has the suffix {suffix!r}, but HPR reads only {suffixes()}: convert the file to one of these formats, "
            f"or rename it to .txt if it holds one text per line"
        )
    return FORMATS[suffix]


def suffixes(kind: Literal["texts", "labels", "array"] | None = None) -> str:
    """The suffixes in ``FORMATS`` as text, separated by commas: all of them, or those of files that can hold one kind of data.

    The list leaves out the entry for files without a suffix, which are read like ``.txt``.
    """
    entries = FORMATS.items()
    return ", ".join(suffix for suffix, entry in entries if suffix and (kind is None or getattr(entry, kind) is not None))


def read_texts(path: Source, column: Column = None) -> list[str]:
    """The texts of a file, without empty ones: the lines of plain text, a field of JSON lines, or a column of a table.

    If lines of ``<|endoftext|>`` separate the documents of a plain text file, each document is one text with its line breaks.

    ``column`` is a name in the first row of a table, the field in JSON lines, or a number from 0 for a table without a header.
    By default it is ``text`` or ``sentence`` in a table, or the only column, and ``text`` in JSON lines. ``FORMATS`` lists the
    formats. Raises ``DataError`` for another format, for a missing, empty or undecodable file, and for a line without a text;
    the message gives the number of the line.
    """
    reader = format_of(path).texts
    if reader is None:
        raise DataError(
            f"{path} holds an array, not texts: use hpr.data.files.read_array, or give a file ({suffixes('texts')})"
        )
    texts = [text.strip() for text in reader(path, column) if text.strip()]
    if not texts:
        raise DataError(f"{path} holds no text: give at least one line of text")
    return texts


def read_labels(path: Source) -> list[float] | None:
    """The numbers in the column ``label`` of a table, or in this field of JSON lines; None for a file without labels.

    Raises ``DataError`` for a label that is no number.
    """
    reader = format_of(path).labels
    values = None if reader is None else reader(path)
    if values is None or all(value is None for value in values):
        return None
    return [as_label(value, number, path) for number, value in enumerate(values, 1)]


def as_label(value: Any, number: int, source: object) -> float:
    """The label as a class number (int) or a score (float).

    ``number`` and ``source`` say in error messages which example of which data it is. Raises ``DataError`` for a value that
    is no finite number.
    """
    try:
        score = float(value)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{source}, example {number}: the label {value!r:.40} is no number: give a class number or a score"
        ) from error
    if not math.isfinite(score):
        raise DataError(f"{source}, example {number}: the label {value!r} is not finite: give a class number or a score")
    return int(score) if score.is_integer() and "." not in str(value) else score


def read_array(
    source: Source | Shaped[np.ndarray, "examples ..."], key: str | None = None
) -> Shaped[np.ndarray, "examples ..."]:
    """The array in a file, or a given array unchanged, after a check that it holds at least one example and finite numbers.

    ``key`` names the array in an ``.npz``; a file with one array needs no name. Raises ``DataError`` for a missing or damaged
    file, for an array without examples or without numbers, and for values that are not finite; the message gives the row.
    """
    if isinstance(source, np.ndarray):
        array, name = source, "the array"
    else:
        reader, name = format_of(source).array, f"{source}"
        if reader is None:
            raise DataError(f"{name} holds texts, not an array: give a file ({suffixes('array')})")
        array = reader(source, key)
    if array.dtype.kind not in "fiub" or array.dtype.itemsize > 8:
        raise DataError(
            f"{name} has dtype {array.dtype}, but HPR reads numbers of at most 64 bits: convert it to float32 or int64"
        )
    if not array.ndim or not array.size:
        raise DataError(f"{name} has shape {array.shape}: give at least one example, with examples along the first axis")
    finite = np.isfinite(array).reshape(len(array), -1).all(axis=1)
    if not finite.all():
        count = int((~finite).sum())
        raise DataError(f"{name}: row {int(np.argmin(finite))} is not finite ({count} such rows): remove these rows")
    return array


def _decoded(path: Source) -> str:
    """The content of a UTF-8 file."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"no file at {path}: check the path") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): give a readable file") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 at byte {error.start}: convert it to UTF-8") from error
    if not text.strip():
        raise DataError(f"{path} is empty: give at least one example")
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
            raise DataError(
                f"{path}, line {number}: no JSON object with a field {field!r}: correct or remove the line"
            ) from error
        if not isinstance(value, str):
            kind = type(value).__name__
            raise DataError(f"{path}, line {number}: {field!r} is a {kind}, not a string: correct or remove the line")
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
    """The rows of a table that are not empty. Quotes in a ``.tsv`` are part of the text."""
    tabs = Path(path).suffix.lower() == ".tsv"
    lines = io.StringIO(_decoded(path), newline="")
    try:
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if tabs else csv.reader(lines, strict=True)
        return [row for row in reader if any(cell.strip() for cell in row)]
    except csv.Error as error:
        raise DataError(f"{path} is no table ({error}): check its quotes and line ends") from error


def _column(path: Source, rows: list[list[str]], column: Column) -> list[str]:
    """The cells of one column of a table, without its header."""
    header = [cell.strip() for cell in rows[0]]
    if isinstance(column, int):
        index, body = column, rows
    else:
        wanted = [column] if column is not None else [name for name in TEXT_COLUMNS if name in header]
        if not wanted and len(header) == 1:
            _log.info("%s has a single column, which is not named text or sentence: its first row is read as a text, too", path)
            index, body = 0, rows
        elif not wanted or wanted[0] not in header:
            missing = "" if column is None else f" {column!r}"
            raise DataError(f"{path} has no column{missing}, it has {', '.join(header)}: name one, or give its number from 0")
        else:
            index, body = header.index(wanted[0]), rows[1:]
    short = next((number for number, row in enumerate(body) if not 0 <= index < len(row)), None)
    if short is not None:
        raise DataError(f"{path}: row {short + 1 + len(rows) - len(body)} has no column number {index}: check its separators")
    return [row[index] for row in body]


def _read_numpy(path: Source, key: str | None) -> np.ndarray:
    """The array of an ``.npy`` file, or one array of an ``.npz`` file."""
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


_LINES = FileFormat(texts=_read_lines)
_TABLE = FileFormat(texts=_read_column, labels=_read_label_column)
_NUMPY = FileFormat(array=_read_numpy)
FORMATS: dict[str, FileFormat] = {
    ".txt": _LINES,
    ".text": _LINES,
    ".md": _LINES,
    "": _LINES,  # a file without a suffix
    ".jsonl": FileFormat(texts=_read_json_texts, labels=_read_json_labels),
    ".csv": _TABLE,
    ".tsv": _TABLE,
    ".npy": _NUMPY,
    ".npz": _NUMPY,
}
