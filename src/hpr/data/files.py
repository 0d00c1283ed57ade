"""Read texts, labels and arrays from files. ``FORMATS`` maps the suffix of a file to its reader.

A new format is one reader and one entry. Error messages and the help of ``--data`` list the suffixes by ``suffixes``. Any file
may be compressed, with a second suffix such as ``.gz``.
"""

from __future__ import annotations

import lzma
import re
import tokenize
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Shaped

from hpr.data.contents import Source, check_file, opened, suffix_of, text_of
from hpr.data.datasets import read_arrow
from hpr.data.delimited import read_delimited, refuse_table
from hpr.data.json_rows import read_json, read_json_lines, refuse_json
from hpr.data.tables import Column, Table, read_table
from hpr.errors import DataError

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
    lzma.LZMAError,
)


@dataclass(frozen=True)
class FileFormat:
    """The reader of one file format; one of the three fields is set.

    ``texts(path)`` returns the texts of a file without columns. ``table(path, wanted)`` returns a table; ``wanted`` are the
    columns that the user names or numbers, for formats that have to tell a header from a row. ``array(path, key)`` returns an
    array whose first axis counts examples. A reader raises ``DataError`` for a damaged file. The functions below check the
    values that a reader returns.
    """

    texts: Callable[[Source], list[str]] | None = None
    table: Callable[[Source, Sequence[Column]], Table] | None = None
    array: Callable[[Source, str | None], np.ndarray] | None = None


def format_of(path: Source) -> FileFormat:
    """The entry in ``FORMATS`` for the suffix of a file.

    Raises ``DataError`` for a suffix without an entry, because HPR would read such a file as lines of text by mistake.
    """
    suffix = suffix_of(path)
    if suffix not in FORMATS:
        check_file(path)
        raise DataError(
            f"{path} has the suffix {suffix!r}, but HPR reads only {suffixes()}: convert the file to one of these formats, "
            f"or rename it to .txt if it holds one text per line"
        )
    return FORMATS[suffix]


def suffixes(kind: Literal["texts", "table", "array"] | None = None) -> str:
    """The suffixes in ``FORMATS`` as text, separated by commas: all of them, or those of files that can hold one kind of data.

    Tables hold texts, too. The list leaves out the entry for files without a suffix, which are read like ``.txt``.
    """
    holds = {"texts": ("texts", "table"), "table": ("table",), "array": ("array",)}
    kinds = ("texts", "table", "array") if kind is None else holds[kind]
    return ", ".join(suffix for suffix, entry in FORMATS.items() if suffix and any(getattr(entry, name) for name in kinds))


def read_texts(path: Source, column: Column = None) -> list[str]:
    """The texts of a file, without empty ones: the lines of plain text, or a column of a table.

    If lines of ``<|endoftext|>`` separate the documents of a plain text file, each document is one text with its line breaks.

    ``column`` is the name of a column, or its number from 0. By default it is ``text``, ``sentence`` or a like name (see
    ``hpr.data.tables.TEXT_COLUMNS``), or the only column. ``FORMATS`` lists the formats. Raises ``DataError`` for another
    format, for a missing, empty or undecodable file, and for a row without a text; the message gives its number.
    """
    values, _ = read_examples(path, column=column)
    if not all(isinstance(value, str) for value in values):
        raise DataError(f"{path} holds numbers, not texts: give a file ({suffixes('texts')})")
    return values


def read_labels(path: Source, label: Column = None) -> list[float] | None:
    """The numbers in a column of a table, by default ``label`` or ``labels``; None for a file without labels.

    Raises ``DataError`` for a label that is no number.
    """
    reader = format_of(path).table
    if reader is None:
        return None
    table = reader(path, (label,))
    index = table.label_column(label)
    return None if index is None else table.labels(index)


def read_examples(
    path: Source, labels: bool = False, column: Column = None, label: Column = None
) -> tuple[list[Any], list[float] | None]:
    """The texts of a file, or its rows of model inputs (see ``hpr.data.tables.read_table``), and its labels if they are wanted.

    Raises ``DataError`` for a ``column`` or ``label`` in a file without columns, and for what ``read_texts`` refuses.
    """
    entry = format_of(path)
    if entry.table is not None:
        return read_table(entry.table(path, (column, label)), labels, column, label)
    if entry.texts is None:
        raise DataError(
            f"{path} holds an array, not texts: use hpr.data.files.read_array, or give a file ({suffixes('texts')})"
        )
    if column is not None or label is not None:
        raise DataError(
            f"{path} is plain text without columns, so it has no column {label if column is None else column!r}: "
            f"leave the column out, or give a table ({suffixes('table')})"
        )
    texts = [text.strip() for text in entry.texts(path) if text.strip()]
    if not texts:
        raise DataError(f"{path} holds no text: give at least one line of text")
    return texts, None


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


def _read_lines(path: Source) -> list[str]:
    """The documents of a plain text file, or its lines if it is not divided into documents."""
    text = text_of(path)
    refuse_json(path, text)
    refuse_table(path, text)
    documents = _BETWEEN_DOCUMENTS.split(text.replace("\r\n", "\n"))
    return documents if len(documents) > 1 else text.splitlines()


def _read_numpy(path: Source, key: str | None) -> np.ndarray:
    """The array of an ``.npy`` file, or one array of an ``.npz`` file."""
    try:
        with opened(path) as file:
            loaded = np.load(file, allow_pickle=False)
            if isinstance(loaded, np.ndarray):
                if key is not None:
                    raise DataError(
                        f"{path} holds a single array without a name, so it has no column {key!r}: leave the column out"
                    )
                return loaded
            name = loaded.files[0] if key is None and len(loaded.files) == 1 else key
            if name not in loaded.files:
                missing = "several arrays" if key is None else f"no array {key!r}"
                raise DataError(
                    f"{path} has {missing}, it has {', '.join(loaded.files)}: name one with --column NAME "
                    f"(in Python: hpr.extras.Columns(data, column=...))"
                )
            return loaded[name]
    except DataError:
        raise
    except _DAMAGED as error:
        raise DataError(f"{path} is no array file or is damaged ({error}): write it with numpy.save or savez") from error


_LINES = FileFormat(texts=_read_lines)
_JSON_LINES = FileFormat(table=read_json_lines)
_TABLE = FileFormat(table=read_delimited)
_ARROW = FileFormat(table=read_arrow)
_NUMPY = FileFormat(array=_read_numpy)
FORMATS: dict[str, FileFormat] = {
    ".txt": _LINES,
    ".text": _LINES,
    ".md": _LINES,
    "": _LINES,  # a file without a suffix
    ".jsonl": _JSON_LINES,
    ".ndjson": _JSON_LINES,
    ".json": FileFormat(table=read_json),
    ".csv": _TABLE,
    ".tsv": _TABLE,
    ".parquet": _ARROW,
    ".arrow": _ARROW,
    ".feather": _ARROW,
    ".npy": _NUMPY,
    ".npz": _NUMPY,
}
