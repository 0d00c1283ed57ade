"""What a data file is: text in several encodings, compressed files, and what is no text and is refused by what it is."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import sqlite3
import zipfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import save

from hpr.data.files import read_array, read_texts
from hpr.data.splits import rows_of
from hpr.errors import DataError

TEXTS = ["a dog", "the cat", "Привет мир", "一二三一"]


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("word/document.xml", "text")
    return file.getvalue()


def database(folder: Path) -> bytes:
    path = folder / "database"
    connection = sqlite3.connect(path)
    connection.execute("create table texts (text)")
    connection.close()
    return path.read_bytes() or b"SQLite format 3\0"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("texts", [TEXTS[:2], TEXTS[2:], ["hello world"]])
def test_text_with_and_without_a_byte_order_mark(tmp_path: Path, encoding: str, texts: list[str]) -> None:
    (tmp_path / "x.txt").write_bytes("\n".join(texts).encode(encoding))
    assert read_texts(tmp_path / "x.txt") == texts
    (tmp_path / "x.csv").write_bytes("\n".join(["text;label", *(f"{text};1" for text in texts)]).encode(encoding))
    assert read_texts(tmp_path / "x.csv") == texts
    (tmp_path / "x.jsonl").write_bytes("\n".join(json.dumps({"text": text}) for text in texts).encode(encoding))
    assert read_texts(tmp_path / "x.jsonl") == texts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"one\0two\n", "has a NUL at byte 3"),
        (b"one\0two three\n" * 9, "has a NUL at byte 3"),
        (b"\1\2" * 40, "has 80 control characters in 80 bytes"),
        ("\n".join(TEXTS).encode("utf-16")[:-1], "is not UTF-16, as its byte-order mark says, at byte"),
        (np.arange(400, dtype=np.int16).tobytes(), "so it is no text|is not UTF-8"),
    ],
)
def test_bytes_that_are_no_text(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "x.txt").write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_texts(tmp_path / "x.txt")


def test_binary_files_under_a_text_name_are_refused_by_what_they_are(tmp_path: Path) -> None:
    table = pa.table({"text": TEXTS})
    parquet, feather, stream, array = io.BytesIO(), io.BytesIO(), io.BytesIO(), io.BytesIO()
    pa.parquet.write_table(table, parquet)
    pa.feather.write_feather(table, feather)
    with pa.ipc.new_stream(stream, table.schema) as writer:
        writer.write_table(table)
    np.save(array, np.ones(3))
    contents = {
        "gzip data, not text: give its name the end .gz": gzip.compress(b"one\n"),
        "bzip2 data": bz2.compress(b"one\n"),
        "xz data": lzma.compress(b"one\n"),
        "a zip archive (such as .docx": zipped(),
        "a PDF document": b"%PDF-1.4\n1 0 obj",
        "an RTF document": b"{\\rtf1\\ansi text}",
        "an HTML page": b"<!DOCTYPE html>\n<p>text",
        "an XML document": b'\xef\xbb\xbf<?xml version="1.0"?><text/>'[3:],
        "a pickle": pickle.dumps(TEXTS),
        "a safetensors file": save({"a": torch.ones(3)}),
        "an SQLite database": database(tmp_path),
        "a Parquet table, not text: give its name the end .parquet": parquet.getvalue(),
        "an Arrow table": feather.getvalue(),
        "an Arrow stream": stream.getvalue(),
        "a NumPy array": array.getvalue(),
        "a PNG image": b"\x89PNG\r\n\x1a\n\0\0",
        "a JPEG image": b"\xff\xd8\xff\xe0\0",
        "a WAV, AVI or WebP file": b"RIFF\0\0\0\0WAVE",
    }
    for name in ("x.txt", "x", "x.csv", "x.jsonl", "x.json"):
        for kind, content in contents.items():
            (tmp_path / name).write_bytes(content)
            with pytest.raises(DataError) as caught:
                rows_of(tmp_path / name)
            assert f"{name} is {kind}" in str(caught.value)


def test_json_under_a_text_name_is_refused(tmp_path: Path) -> None:
    rows = [{"text": text} for text in TEXTS]
    for content, suffix in (
        (json.dumps(rows, indent=1), "json"),
        (json.dumps(TEXTS), "json"),
        ("\n".join(map(json.dumps, rows)), "jsonl"),
    ):
        for name in ("x.txt", "x.csv", "x.tsv"):
            (tmp_path / name).write_text(content, encoding="utf-8")
            with pytest.raises(DataError, match=rf"holds JSON, .* rename it to \.{suffix}$"):
                read_texts(tmp_path / name)
    (tmp_path / "x.txt").write_text("[Scene 1] {enter}\n{a} and {b}", encoding="utf-8")
    assert read_texts(tmp_path / "x.txt") == ["[Scene 1] {enter}", "{a} and {b}"]


@pytest.mark.parametrize("name", ["x.txt", "x", "x.md"])
def test_tables_under_a_text_name_are_refused(tmp_path: Path, name: str) -> None:
    for header, delimiter, suffix in (
        ("text,label", ",", "csv"),
        ('"Label";"Text"', ";", "csv"),
        ("sentence\tid", "\t", "tsv"),
    ):
        (tmp_path / name).write_text("\n".join([header, *(f"a dog{delimiter}1" for _ in range(9))]), encoding="utf-8")
        with pytest.raises(DataError, match=rf"is a table: its first line .* rename it to \.{suffix}$"):
            read_texts(tmp_path / name)
    for content in (
        "Text, content and form\nof a document, as it is",
        "text,sentence\nno comma",
        "text,label",
        "\n" * 200_000 + "a",
    ):
        (tmp_path / name).write_text(content, encoding="utf-8")
        assert read_texts(tmp_path / name) == content.strip().split("\n")


@pytest.mark.parametrize(("suffix", "pack"), [("gz", gzip.compress), ("bz2", bz2.compress), ("XZ", lzma.compress)])
def test_compressed_files(tmp_path: Path, suffix: str, pack) -> None:
    array, table = io.BytesIO(), io.BytesIO()
    np.save(array, np.ones((3, 2)))
    pa.parquet.write_table(pa.table({"text": ["one", "two"]}), table)
    files = {"x.txt": b"one\ntwo", "x.csv": b"text,label\none,1\ntwo,0\n", "x.jsonl": b'{"text": "one"}\n{"text": "two"}'}
    for name, content in {**files, "x.parquet": table.getvalue()}.items():
        path = tmp_path / f"{name}.{suffix}"
        path.write_bytes(pack(content))
        assert read_texts(path) == ["one", "two"]
        path.write_bytes(content)
        with pytest.raises(DataError, match="cannot be unpacked"):
            read_texts(path)
        path.write_bytes(pack(content)[:-12])
        with pytest.raises(DataError, match="cannot be unpacked"):
            read_texts(path)
    (tmp_path / f"x.npy.{suffix}").write_bytes(pack(array.getvalue()))
    assert read_array(tmp_path / f"x.npy.{suffix}").shape == (3, 2)
    (tmp_path / f"x.npy.{suffix}").write_bytes(array.getvalue())
    with pytest.raises(DataError, match="is damaged"):
        read_array(tmp_path / f"x.npy.{suffix}")


def test_what_is_no_file(tmp_path: Path) -> None:
    for name in ("folder", "folder.csv", "folder.npy", "folder.2026"):
        (tmp_path / name).mkdir()
        with pytest.raises(DataError, match="is a folder, which cannot be read as one file"):
            rows_of(tmp_path / name)
    (tmp_path / "folder" / "dataset_info.json").touch()
    with pytest.raises(DataError, match="load_from_disk"):
        rows_of(tmp_path / "folder")
    os.mkfifo(tmp_path / "pipe.csv")
    for path in (tmp_path / "pipe.csv", "/dev/zero"):
        with pytest.raises(DataError, match="is a pipe or a device, not a file"):
            rows_of(path)
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "loop.txt").symlink_to(tmp_path / "loop.txt")
    (tmp_path / "file.txt").touch()
    for name in ("dangling.txt", "loop.txt", "file.txt/x.txt", "none.parquet", "none.json", "none.csv.gz", "x" * 300):
        with pytest.raises(DataError, match="no file at"):
            rows_of(tmp_path / name)
    with pytest.raises(DataError, match="is no path"):
        rows_of("a\0b.txt")
    for name in ("empty.txt", "empty.csv", "empty.json", "empty.jsonl", "empty.parquet", "empty.arrow"):
        (tmp_path / name).touch()
        with pytest.raises(DataError, match="is empty"):
            rows_of(tmp_path / name)
