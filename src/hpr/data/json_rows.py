"""Reads tables from JSON (``.json``) and JSON lines (``.jsonl``)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hpr.data.contents import Source, text_of
from hpr.data.tables import MISSING, TEXT_COLUMNS, Column, Table
from hpr.errors import DataError
from hpr.runtime.files import parse_json

_SHAPES = "a list of objects, a list of strings, or an object of lists of equal length"


def read_json_lines(path: Source, wanted: Sequence[Column] = ()) -> Table:
    """The objects or strings in the lines of a file, as a table. Raises ``DataError`` with the number of a damaged line."""
    return _lines(path, text_of(path))


def read_json(path: Source, wanted: Sequence[Column] = ()) -> Table:
    """The table in a JSON file: a list of objects or strings, an object of columns, or an object with one such list.

    JSON lines under this suffix are read as such. Raises ``DataError`` for a damaged file and for JSON of another shape.
    """
    text = text_of(path)
    try:
        value = _parsed(text)
    except ValueError as error:
        lines = [line for line in text.split("\n") if line.strip()]
        if len(lines) > 1 and all(line.lstrip().startswith("{") for line in lines):
            return _lines(path, text)
        raise DataError(f"{path} is no JSON ({error}): correct it, or give the texts as lines of a .txt file") from error
    return _shaped(path, value)


def refuse_json(path: Source, text: str) -> None:
    """Raise ``DataError`` if a text is JSON, whose syntax would be read as text."""
    if suffix := _suffix_for(text):
        raise DataError(f"{path} holds JSON, whose syntax is not text to read: rename it to {suffix}")


def _suffix_for(text: str) -> str | None:
    """The suffix for a text that is JSON with objects or strings in it; None for other texts."""
    if not text.lstrip().startswith(("{", "[")):
        return None
    lines = [line for line in text.split("\n") if line.strip()]
    if len(lines) > 1 and all(isinstance(_value(line), dict) for line in (lines[0], lines[-1])):
        return ".jsonl"
    value = _value(text)
    return (
        ".json" if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict | str)) else None
    )


def table_of_objects(title: str, rows: Sequence[Mapping[str, Any]], numbers: Sequence[int], unit: str = "row") -> Table:
    """A table of objects; its columns are the fields of all objects, in the order in which they come up."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return Table(title, names, lambda index: [row.get(names[index], MISSING) for row in rows], numbers, unit)


def _lines(path: Source, text: str) -> Table:
    rows, numbers = [], []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold other line separators
        if not line.strip():
            continue
        try:
            value = _parsed(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: no JSON object ({error}): correct or remove the line") from error
        if not isinstance(value, dict | str):
            kind = type(value).__name__
            raise DataError(f"{path}, line {number}: a {kind}, not a JSON object: correct or remove the line")
        rows.append({TEXT_COLUMNS[0]: value} if isinstance(value, str) else value)
        numbers.append(number)
    return table_of_objects(str(path), rows, numbers, "line")


def _shaped(path: Source, value: Any) -> Table:
    if isinstance(value, list):
        return _listed(path, value)
    if isinstance(value, dict):
        lists = {name: cells for name, cells in value.items() if isinstance(cells, list)}
        if not lists and value and all(isinstance(cells, dict) for cells in value.values()):
            lists = {name: list(cells.values()) for name, cells in value.items()}  # columns by the number of the row
        if len(lists) == 1 and (only := next(iter(lists.values()))) and all(isinstance(cell, dict) for cell in only):
            return _listed(path, only)
        if lists and len({len(cells) for cells in lists.values()}) == 1 and not any(map(_has_objects, lists.values())):
            names, columns = list(lists), list(lists.values())
            return Table(str(path), names, columns.__getitem__, range(1, len(columns[0]) + 1))
        if lists:
            sizes = ", ".join(f"{name!r} with {len(cells)} entries" for name, cells in lists.items())
            raise DataError(f"{path} has the lists {sizes}, which is no table: give {_SHAPES}")
        if value and not any(isinstance(cell, dict) for cell in value.values()):
            return table_of_objects(str(path), [value], [1])
    raise DataError(f"{path} holds a JSON {type(value).__name__} that is no table: give {_SHAPES}")


def _listed(path: Source, values: list[Any]) -> Table:
    kinds = dict if values and isinstance(values[0], dict) else str
    for number, value in enumerate(values, 1):
        if not isinstance(value, kinds):
            found, wanted = type(value).__name__, "an object" if kinds is dict else "a string"
            raise DataError(f"{path}, row {number}: a {found}, not {wanted}: give {_SHAPES}")
    rows = values if kinds is dict else [{TEXT_COLUMNS[0]: value} for value in values]
    return table_of_objects(str(path), rows, range(1, len(rows) + 1))


def _has_objects(cells: list[Any]) -> bool:
    return any(isinstance(cell, dict) for cell in cells)


def _value(text: str) -> Any:
    """The value of a JSON text; None if the text is no JSON."""
    try:
        return _parsed(text)
    except ValueError:
        return None


def _parsed(text: str) -> Any:
    """The value of a JSON text. Raises ``ValueError`` if it is damaged, nested too deeply or gives a field twice."""
    try:
        return parse_json(text, _object)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if "\n" in text else ""
        raise ValueError(f"{error.msg} at {line}character {error.colno}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {next(name for name in names if names.count(name) > 1)!r} is given twice")
    return made
