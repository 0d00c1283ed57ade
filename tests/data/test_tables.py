"""Tables from CSV, JSON, Parquet, Arrow and memory: one reading of delimiters, headers, columns of texts and labels."""

from __future__ import annotations

import csv
import io
import json
import struct
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest

from hpr.data.files import read_labels, read_texts
from hpr.data.splits import rows_of
from hpr.errors import DataError
from hpr.extras import Columns

ROWS = [{"text": f"text {number}, and a dog", "label": number % 3} for number in range(9)]
TEXTS, LABELS = [row["text"] for row in ROWS], [row["label"] for row in ROWS]


def read(path: Any, labels: bool = True, **columns: Any) -> tuple[list[Any], list[float] | None]:
    rows = rows_of(Columns(path, **columns) if columns else path, labels=labels)
    return list(rows.values), rows.labels


def written(folder: Path, name: str, content: Any) -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8", newline="")
    return path


# --- delimiters and quotes


@pytest.mark.parametrize("name", ["x.csv", "X.CSV", "x.tsv"])
@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_the_delimiter_is_found(tmp_path: Path, name: str, delimiter: str) -> None:
    lines = [delimiter.join(("text", "label")), *(f"{row['text']}{delimiter}{row['label']}" for row in ROWS)]
    assert read(written(tmp_path, name, "\n".join(lines))) == (TEXTS, LABELS)


@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("x.csv", 'text,label\n"a, b",1\n"c ""d""",0\n', ["a, b", 'c "d"']),
        ("x.csv", 'label, text\n1, "a, b"\n0, c\n', ["a, b", "c"]),
        ("x.csv", 'text,label\n"a\n\nb",1\n\n\nc,0\n', ["a\n\nb", "c"]),
        ("x.csv", "text,label\ra,1\rc,0\r", ["a", "c"]),
        ("x.csv", "sep=;\r\ntext;label\r\na, b;1\r\nc;0\r\n", ["a, b", "c"]),
        ("x.csv", "text;label\na;1\nb, c;0\n", ["a", "b, c"]),
        ("x.tsv", "text,label\na,1\nc,0\n", ["a", "c"]),  # a wrong name
        ("x.tsv", 'text\tlabel\n"a\t1\nb"\t0\n', ['"a', 'b"']),
        ("x.tsv", 'text\tlabel\n"a\nb"\t1\nc\t0\n', ["a\nb", "c"]),  # quotes are needed for even rows
    ],
)
def test_quotes_and_lines(tmp_path: Path, name: str, content: str, texts: list[str]) -> None:
    assert read(written(tmp_path, name, content)) == (texts, [1, 0])


@pytest.mark.parametrize(
    ("content", "columns", "message"),
    [
        ("text,label\na, b,1\n", {}, "row 2: 3 cells, but the header has 2: put cells with a comma in double quotes"),
        ("text;label\na;1\nb; c;1\n", {}, "row 3: 3 cells, but the header has 2: put cells with a semicolon"),
        ("text\nhello, you\nx\n", {}, r"row 2: 2 cells, but the header has 1: .*rename the file to \.txt"),
        ("0,a, b\n1,c\n", {"column": 1}, "row 2: 2 cells, but row 1 has 3"),
        ("a, b, 1\nc,0\n", {"column": 0}, "row 2: 2 cells, but row 1 has 3"),
        ("a;b,c;d\n1;2,3;4\n", {}, "does not show which delimiter it has .comma: 2 cells in every row; semicolon: 3 cells"),
        ("a;b,c\n1;2\n3,4\n5\n", {}, "comma: 2 cells in row 1, 1 in row 2; semicolon: 2 cells in row 1, 1 in row 3"),
        ('text,label\n"a,1\nb,2\n', {}, "is no table .unexpected end of data"),
        ("text,label\n", {}, "is empty below its header"),
        ("sep=;\n", {}, "is empty: give at least one example"),
        (",,\n,,\n", {}, "is empty: give at least one example"),
        ("text,text\na,b\n", {}, "has 2 columns with the name 'text', number 0, 1: give the number of one"),
    ],
)
def test_a_text_is_never_cut_at_a_delimiter(tmp_path: Path, content: str, columns: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(written(tmp_path, "x.csv", content), labels=False, **columns)


def test_cells_have_any_length_and_the_limit_of_the_csv_module_stays(tmp_path: Path) -> None:
    before = csv.field_size_limit()
    text = ("word, " * 40000).strip()
    path = written(tmp_path, "x.csv", "text,label\n" + "\n".join(f'"{text}",1' for _ in range(3)))
    assert read(path) == ([text] * 3, [1, 1, 1])
    with pytest.raises(DataError):
        read(written(tmp_path, "y.csv", f'text,label\n"{text}'))
    assert csv.field_size_limit() == before < len(text)


# --- headers and columns


@pytest.mark.parametrize(
    "header", ["Text,label", " text , label ", "TEXT,Labels", "sentence,labels", "Content,LABEL", "document,label"]
)
def test_one_reading_of_headers(tmp_path: Path, header: str) -> None:
    path = written(tmp_path, "x.csv", f"{header}\na,1\nb,0\n")
    assert read(path) == (["a", "b"], [1, 0])
    assert read(datasets.Dataset.from_dict(dict(zip(header.split(","), (["a", "b"], [1, 0]), strict=True)))) == (
        ["a", "b"],
        [1, 0],
    )
    names = header.split(",")
    lines = [json.dumps(dict(zip(names, row, strict=True))) for row in (("a", 1), ("b", 0))]
    assert read(written(tmp_path, "x.jsonl", "\n".join(lines))) == (["a", "b"], [1, 0])


@pytest.mark.parametrize(
    "columns",
    [
        {"column": "review", "label": "stars"},
        {"column": " REVIEW", "label": "Stars"},
        {"column": 0, "label": 1},
        {"column": "0", "label": "1"},
    ],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "json", "parquet", "datasets", "pandas", "list"])
def test_columns_by_name_or_number(tmp_path: Path, kind: str, columns: dict) -> None:
    rows = [{"review": text, "stars": label} for text, label in zip(TEXTS, LABELS, strict=True)]
    frame = pd.DataFrame(rows)
    path: Any = tmp_path / f"x.{kind}"
    if kind == "csv":
        frame.to_csv(path, index=False)
    elif kind == "parquet":
        frame.to_parquet(path)
    elif kind == "jsonl":
        written(tmp_path, path.name, "\n".join(map(json.dumps, rows)))
    elif kind == "json":
        written(tmp_path, path.name, rows)
    else:
        path = {"datasets": datasets.Dataset.from_list(rows), "pandas": frame, "list": rows}[kind]
    assert read(path, **columns) == (TEXTS, LABELS)
    with pytest.raises(DataError, match=r"has no column 'text' or 'sentence', it has 'review', 'stars': .*--column NAME"):
        read(path, labels=False)
    with pytest.raises(DataError, match=r"has no column 'no', it has 'review', 'stars': .*Columns\(data, label=\.\.\.\)"):
        read(path, labels=False, column="review", label="no")


@pytest.mark.parametrize(
    ("content", "columns", "expected"),
    [
        ("a b,1\nc,0\n", {"column": 0, "label": 1}, (["a b", "c"], [1, 0])),
        ("a b,1\nc,0\n", {"column": "0", "label": "1"}, (["a b", "c"], [1, 0])),  # as the command line gives numbers
        ("review,stars\na b,1\nc,0\n", {"column": "0", "label": "1"}, (["a b", "c"], [1, 0])),  # a word above numbers
        ("0,1\na b,1\nc,0\n", {"column": "0", "label": "1"}, (["a b", "c"], [1, 0])),
        ("x,Text,label\n,a b,1\n,c,0\n", {"column": 1}, (["a b", "c"], [1, 0])),
    ],
)
def test_tables_with_and_without_a_header(tmp_path: Path, content: str, columns: dict, expected: Any) -> None:
    assert read(written(tmp_path, "x.csv", content), **columns) == expected


def test_names_that_differ_only_in_case(tmp_path: Path) -> None:
    path = written(tmp_path, "x.csv", "Text,TEXT,label\na,b,1\n")
    with pytest.raises(DataError, match=r"has 2 columns with the name 'text'"):
        read(path)
    assert read(path, column="TEXT")[0] == ["b"]
    assert read(path, column=0)[0] == ["a"]


def test_columns_of_data_without_columns(tmp_path: Path) -> None:
    path = written(tmp_path, "x.txt", "a\nb\n")
    with pytest.raises(DataError, match="is plain text without columns, so it has no column 'review': leave the column out"):
        read(path, column="review")
    with pytest.raises(DataError, match="holds a list, which has no columns"):
        read(TEXTS, column="review")
    np.savez(tmp_path / "x.npz", a=np.ones((2, 2)), b=np.zeros((2, 3)))
    assert np.asarray(read(tmp_path / "x.npz", labels=False, column="b")[0]).shape == (2, 3)
    with pytest.raises(DataError, match=r"has several arrays, it has a, b: name one with --column"):
        read(tmp_path / "x.npz", labels=False)
    with pytest.raises(DataError, match="have no column of labels"):
        read(tmp_path / "x.npz", labels=False, column="b", label="a")


# --- labels


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", "text,label\na,1\nb\n", "row 3, column 'label': there is no label"),
        ("x.csv", "text,label\na,1\nb,\n", "row 3, column 'label': there is no label"),
        ("x.csv", "text,label\n\na,1\nb,good\n", "row 4, column 'label': the label 'good' is no number"),
        ("x.csv", "label,text\n1,a\n2\n", "row 3, column 'text': the row has no such cell"),
        ("x.csv", "text,label\na,1\n ,2\n", "1 examples and 2 labels: give each text one label; row 3 has no text"),
        ("x.jsonl", '{"text": "a", "label": 1}\n\n{"text": "b"}', "line 3, column 'label': there is no label"),
        (
            "x.jsonl",
            '{"text": "a", "label": 1}\n{"text": "b", "label": "x"}',
            "line 2, column 'label': the label 'x' is no number",
        ),
        ("x.jsonl", '{"text": "a", "label": [1, 0]}', "line 1, column 'label': the label .1, 0. is no number"),
        ("x.jsonl", '{"text": "a", "label": 1' + "0" * 400 + "}", "line 1, column 'label': the label 10* is no number"),
        ("x.jsonl", '{"text": "a", "label": NaN}', "line 1, column 'label': the label nan is not finite"),
        ("x.json", [{"text": "a", "label": 1}, {"text": "b"}], "row 2, column 'label': there is no label"),
    ],
)
def test_labels_are_named_by_row_and_column(tmp_path: Path, name: str, content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(written(tmp_path, name, content))


def test_rows_without_a_text_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert read_labels(written(tmp_path, "x.csv", "text,label\na,1\n")) == [1]
    with caplog.at_level("INFO"):
        assert read(written(tmp_path, "x.csv", "text,label\na,1\n ,2\n"), labels=False) == (["a"], None)
    assert "1 rows without a text are left out, the first is row 3" in caplog.text
    assert read(datasets.Dataset.from_dict({"text": ["a", None]}), labels=False) == (["a"], None)  # not the word None
    assert read(pd.DataFrame({"text": ["a", None, float("nan")]}), labels=False) == (["a"], None)
    assert read(written(tmp_path, "x.jsonl", '{"text": null}\n{"text": "a"}'), labels=False) == (["a"], None)


# --- JSON


@pytest.mark.parametrize(
    "content",
    [
        ROWS,
        {"data": ROWS},
        {"version": "1", "rows": ROWS},
        {"text": TEXTS, "label": LABELS},
        {"name": "set", "text": TEXTS, "label": LABELS},
        pd.DataFrame(ROWS).to_json(),
        "\n".join(map(json.dumps, ROWS)),
        json.dumps(ROWS, indent=2),
    ],
)
def test_shapes_of_json(tmp_path: Path, content: Any) -> None:
    for name in ("x.json", "X.JSON"):
        assert read(written(tmp_path, name, content)) == (TEXTS, LABELS)


def test_strings_in_json(tmp_path: Path) -> None:
    for content in (TEXTS, {"data": TEXTS}, {"text": TEXTS}):
        assert read_texts(written(tmp_path, "x.json", content)) == TEXTS
    assert read_texts(written(tmp_path, "x.jsonl", "\n".join(map(json.dumps, TEXTS)))) == TEXTS
    assert read_texts(written(tmp_path, "x.ndjson", "\n".join(map(json.dumps, ROWS)))) == TEXTS


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.json", '[{"text": "a"},', "is no JSON .Expecting value at character 16.: correct it"),
        ("x.json", "[" * 100000, "nested too deeply"),
        ("x.json", "1" * 5000, "is no JSON"),
        ("x.json", [], "is empty"),
        ("x.json", {}, "holds a JSON dict that is no table: give a list of objects"),
        ("x.json", "3", "holds a JSON int that is no table"),
        ("x.json", [["a", 1]], "row 1: a list, not a string"),
        ("x.json", [ROWS[0], "b"], "row 2: a str, not an object"),
        (
            "x.json",
            {"train": ROWS, "test": ROWS},
            "has the lists 'train' with 9 entries, 'test' with 9 entries, which is no table",
        ),
        ("x.json", {"text": ["a", "b"], "label": [1]}, "has the lists 'text' with 2 entries, 'label' with 1 entries"),
        ("x.json", '{"text": "a", "text": "b"}', "the field 'text' is given twice"),
        ("x.jsonl", '{"text": "a"}\n{"text": "b", "text": "c"}', "line 2: no JSON object .the field 'text' is given twice"),
        ("x.jsonl", '{"text": "a"}\n{"sentence": "b"}', "line 2, column 'text': the line has no such cell"),
        ("x.jsonl", '{"text": "a"}\n\n[1]', "line 3: a list, not a JSON object"),
        ("x.jsonl", '{"text": "a \\ud83d"}', "line 1, column 'text': the cell has half a character"),
        ("x.jsonl", '{"text": ["a", "b"]}', "line 1, column 'text': the cell is a list, not a string"),
        ("x.jsonl", json.dumps(ROWS, indent=1), "line 1: no JSON object"),
    ],
)
def test_json_that_is_no_table(tmp_path: Path, name: str, content: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(written(tmp_path, name, content), labels=False)


# --- Parquet, Arrow and tables in memory


def arrow_files(folder: Path, table: pa.Table) -> list[Path]:
    pa.parquet.write_table(table, folder / "x.parquet")
    pa.feather.write_feather(table, folder / "x.feather")
    with pa.ipc.new_file(folder / "file.arrow", table.schema) as file:
        file.write_table(table)
    with pa.ipc.new_stream(folder / "stream.arrow", table.schema) as stream:
        stream.write_table(table)
    return [folder / name for name in ("x.parquet", "x.feather", "file.arrow", "stream.arrow")]


def test_arrow_files(tmp_path: Path) -> None:
    for path in arrow_files(tmp_path, pa.table({"text": TEXTS, "label": LABELS})):
        assert read(path) == (TEXTS, LABELS)
        content = path.read_bytes()
        for damaged in (content[: len(content) // 2], b"hello", content[:8] + b"\1\2" * 40):
            path.write_bytes(damaged)
            with pytest.raises(DataError, match=r"is no (Parquet|Arrow) file or is damaged"):
                read(path)
    for path in arrow_files(tmp_path, pa.table({"input_ids": [[1, 2], [3]], "stars": [1, 2]})):
        assert read(path, labels=False, label="stars")[0] == [{"input_ids": [1, 2]}, {"input_ids": [3]}]
        assert read(path, label="stars")[0] == [{"input_ids": [1, 2], "labels": 1}, {"input_ids": [3], "labels": 2}]
        with pytest.raises(DataError, match="holds numbers, not texts"):
            read_texts(path)


def test_damaged_arrow_data_is_not_read_beyond_its_end(tmp_path: Path) -> None:
    *_, path = arrow_files(tmp_path, pa.table({"text": ["a dog", "a cat"]}))
    content = path.read_bytes()
    for old, new in ((struct.pack("<3i", 0, 5, 10), struct.pack("<3i", 0, 2**30, 10)), (b"\0text\0", b"\0te\xfet\0")):
        assert old in content
        path.write_bytes(content.replace(old, new))
        with pytest.raises(DataError, match="is no Arrow file or is damaged"):
            read(path, labels=False)


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path, *_) = arrow_files(tmp_path, pa.table({"text": TEXTS}))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"needs pyarrow: pip install 'hpr\[data\]'"):
        read(path)


def test_tables_in_memory() -> None:
    data = datasets.Dataset.from_list(ROWS)
    for table in (
        *(data, data.with_format("torch"), data.with_format("numpy"), pd.DataFrame(ROWS)),
        *(pa.table({"text": TEXTS, "label": LABELS}), ROWS),
    ):
        assert read(table) == (TEXTS, LABELS)
    for texts in (np.array(TEXTS), np.array(TEXTS, dtype=object), pd.Series(TEXTS)):
        assert read(texts, labels=False) == (TEXTS, None)
    with pytest.raises(DataError, match="is a stream without a length: give a part of it"):
        read(data.to_iterable_dataset())
    with pytest.raises(DataError, match="row 1, column 'text': the cell is a list"):
        read(datasets.Dataset.from_dict({"text": [["a"], ["b"]]}), labels=False)
    for wrong in (5, b"text", io):
        with pytest.raises(DataError, match="which HPR cannot read"):
            read(wrong)
