"""Texts, tables and arrays become batches; what is wrong with them is named by place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hpr.data.batches import Batches, array_batches, in_input_order, text_batches
from hpr.data.files import FORMATS, read_array, read_labels, read_texts, suffixes
from hpr.data.splits import rows_of
from hpr.errors import DataError, HprError
from hpr.runtime.batch import POSITIONAL

WORDS = ["[PAD]", "[UNK]", "a", "b", "c", "d"]
TEXTS = ["a b c", "d", "a a a a a", "b c", "c c c", "d d"]


def tokenizer(**special: str) -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]", **special)


def decoded(batches: Batches) -> list[str]:
    rows = [ids[mask > 0] for batch in batches for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    return [" ".join(WORDS[token] for token in row) for row in rows]


@pytest.mark.parametrize("special", [{"pad_token": "[PAD]"}, {"eos_token": "d"}, {}])
def test_text_batches_hold_every_text_and_their_order(special: dict) -> None:
    tool = tokenizer(**special)
    batches = text_batches(TEXTS, tool, batch_size=2)
    assert [len(batch["input_ids"]) for batch in batches] == [2, 2, 2]
    assert decoded(batches) == [TEXTS[place] for place in batches.order]
    lengths = torch.tensor([[float(len(text))] for text in decoded(batches)])
    assert in_input_order(lengths, batches)[:, 0].tolist() == [len(text) for text in TEXTS]
    assert sorted(batch["input_ids"].shape[1] for batch in batches) == [2, 3, 5]  # like lengths together: little padding
    assert all(batch["input_ids"].dtype == torch.int64 for batch in batches)
    assert tool.pad_token == special.get("pad_token")
    again = text_batches(TEXTS, tool, batch_size=2)
    assert again.order == batches.order


def test_long_texts_go_on_in_windows() -> None:
    tool = tokenizer()
    batches = text_batches(TEXTS, tool, batch_size=2, max_length=2, windows=100)
    parts = dict(zip(batches.order, decoded(batches), strict=True))
    expected = []
    for text in TEXTS:  # the fewest parts, as equal as they can be
        words = text.split()
        count = -(-len(words) // 2)
        expected += [words[len(words) * i // count : len(words) * (i + 1) // count] for i in range(count)]
    assert [parts[place].split() for place in sorted(parts)] == expected
    first = text_batches(TEXTS, tool, batch_size=2, max_length=2, windows=3)
    assert sorted(decoded(first)) == sorted(" ".join(words) for words in expected[:3])


def test_documents_of_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "stories.txt"
    path.write_text("One.\n\nTwo.\n<|endoftext|>\n Three.\r\n <|endoftext|> \n\n<|endoftext|>\nFour <|endoftext|> in it.\n")
    assert read_texts(path) == ["One.\n\nTwo.", "Three.", "Four <|endoftext|> in it."]


def test_padding_is_the_tokenizers(minilm: Path) -> None:
    tool = AutoTokenizer.from_pretrained(minilm)
    texts = ["a dog", "a dog and a cat"]
    (batch,) = text_batches(texts, tool)
    own = tool(texts, padding=True, return_tensors="pt")
    assert set(batch) == set(own)
    for key in batch:
        assert torch.equal(batch[key], own[key])
    (short,) = text_batches(texts, tool, max_length=5)
    assert short["input_ids"].shape == (2, 5)


def test_text_batches_refuse_what_is_no_text() -> None:
    for texts, message in (
        ([], "no texts"),
        ("abc", "one string"),
        (["a", 3], "text 1 is a int"),
        (["a", " "], "text 1 .* no tokens"),
    ):
        with pytest.raises(HprError, match=message):
            text_batches(texts, tokenizer())
    with pytest.raises(HprError, match="at least 1"):
        text_batches(TEXTS, tokenizer(), batch_size=0)


def test_in_input_order() -> None:
    rows = torch.arange(6).reshape(3, 2)
    assert in_input_order(rows, [1, 2]) is rows
    assert in_input_order(rows, Batches([], [2, 0, 1])).tolist() == [[2, 3], [4, 5], [0, 1]]
    with pytest.raises(HprError, match="3 rows"):
        in_input_order(rows, Batches([], [0, 1]))


@pytest.mark.parametrize(
    ("name", "content", "column"),
    [
        ("x.txt", "\ufeffone, 1\n\n  two\t\r\n", None),
        ("x.jsonl", '{"text": "one, 1"}\n\n{"text": "two", "n": 2}\n', None),
        ("x.jsonl", '{"body": "one, 1"}\n{"body": "two"}', "body"),
        ("x.csv", 'id,text\n1,"one, 1"\n2,two\n', None),
        ("x.csv", 'id,body\r\n1,"one, 1"\r\n2,two', "body"),
        ("x.csv", '1,"one, 1"\n2,two\n', 1),
        ("x.csv", '"one, 1"\ntwo\n', None),
        ("x.tsv", "sentence\tlabel\none, 1\t0\ntwo\t1\n", None),
    ],
)
def test_read_texts(tmp_path: Path, name: str, content: str, column: str | int | None) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert read_texts(tmp_path / name, column) == ["one, 1", "two"]


@pytest.mark.parametrize(
    ("name", "content", "column", "message"),
    [
        ("x.txt", b" \n\n", None, "is empty"),
        ("x.txt", b"caf\xe9", None, "not UTF-8 at byte 3"),
        ("x.jsonl", b'{"text": "a"}\n{"text": ', None, "line 2: no JSON object .Expecting value at character 10"),
        ("x.jsonl", b'{"text": 3}', None, "line 1, column 'text': the cell is a int, not a string"),
        ("x.jsonl", b'{"text": " "}', None, "holds no text"),
        (
            "x.csv",
            b"a,b\n1,2\n",
            None,
            "has no column 'text' or 'sentence', it has 'a', 'b': name the column of texts, with --column NAME",
        ),
        ("x.csv", b"a,b\n1,2\n", "c", "has no column 'c'"),
        ("x.csv", b"text,b\n1,2\n\n", 2, "has no column number 2, it has 'text', 'b'"),
        ("x.csv", b"b,text\n1,2\n3\n", None, "row 3, column 'text': the row has no such cell"),
        ("x.csv", b'text\n"a', None, "is no table"),
    ],
)
def test_bad_texts_are_named(tmp_path: Path, name: str, content: bytes, column: str | int | None, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(HprError, match=message):
        read_texts(tmp_path / name, column)


def test_missing_files(tmp_path: Path) -> None:
    for read, name in ((read_texts, "none"), (read_texts, "none.gz"), (read_array, "none.npy"), (array_batches, "none.npz")):
        with pytest.raises(HprError, match="no file at"):
            read(tmp_path / name)
    with pytest.raises(HprError, match="is a folder"):
        read_texts(tmp_path)


@pytest.mark.parametrize("name", ["x.txt", "x.TXT", "x.text", "x.md", "x"])
def test_plain_text_files(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("one\ntwo\n", encoding="utf-8")
    assert read_texts(tmp_path / name) == ["one", "two"]


@pytest.mark.parametrize("name", ["x.tar.gz", "x.bin", "x.xlsx"])
def test_a_suffix_without_a_format_is_an_error(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(gzip.compress(b"text\none\n") if path.suffix == ".gz" else b"these bytes are valid UTF-8\n")
    suffix = Path(name.removesuffix(".gz")).suffix
    message = f"has the suffix '{suffix}', but HPR reads only {suffixes()}: convert .* or rename it to .txt"
    for read in (read_texts, read_labels, read_array, rows_of):
        with pytest.raises(DataError, match=message):
            read(path)


@pytest.mark.parametrize("name", ["x", "x.txt", "x.jsonl", "x.csv"])
def test_binary_content_behind_a_text_suffix_is_an_error(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"one\n"))
    with pytest.raises(DataError, match=r"is gzip data, not text: give its name the end \.gz"):
        read_texts(tmp_path / name)


def test_suffixes_are_those_of_the_formats() -> None:
    assert suffixes().split(", ") == [suffix for suffix in FORMATS if suffix]
    assert suffixes("array") == ".npy, .npz"
    assert suffixes("table") == ".jsonl, .ndjson, .json, .csv, .tsv, .parquet, .arrow, .feather"
    guide = (Path(__file__).parents[2] / "docs" / "guide.md").read_text(encoding="utf-8")
    assert [suffix for suffix in FORMATS if f"`{suffix}`" not in guide and suffix] == []


def test_array_batches(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float16).reshape(6, 2)
    np.savez(tmp_path / "x.npz", mfcc=array, label=np.arange(6, dtype=np.int8))
    batches = array_batches(tmp_path / "x.npz", "mfcc", batch_size=4)
    assert [batch[POSITIONAL].shape for batch in batches] == [(4, 2), (2, 2)]
    assert batches[0][POSITIONAL].dtype == torch.float32
    assert batches.order == list(range(6))
    assert torch.equal(torch.cat([batch[POSITIONAL] for batch in batches]), torch.arange(12.0).reshape(6, 2))
    assert array_batches(tmp_path / "x.npz", "label")[0][POSITIONAL].dtype == torch.int64
    assert set(array_batches(array, argument="input_values")[0]) == {"input_values"}
    np.save(tmp_path / "x.npy", array)
    assert read_array(tmp_path / "x.npy").shape == (6, 2)
    np.savez(tmp_path / "one.npz", only=array)
    assert read_array(tmp_path / "one.npz").shape == (6, 2)
    for key in (None, "other"):
        with pytest.raises(HprError, match="it has mfcc, label"):
            read_array(tmp_path / "x.npz", key)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[1.0], [2.0], [np.nan], [np.inf]]), r"row 2 is not finite \(2 such rows\)"),
        (np.zeros((0, 3)), "at least one example"),
        (np.array(1.0), "at least one example"),
        (np.array(["a"]), "dtype"),
        (np.array([1e300]), "float32"),
    ],
)
def test_bad_arrays_are_named(array: np.ndarray, message: str) -> None:
    with pytest.raises(HprError, match=message):
        array_batches(array)


def test_damaged_and_pickled_arrays(tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(json.dumps({"no": "array"}).encode())
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    for name in ("x.npz", "objects.npy"):
        with pytest.raises(HprError, match="damaged"):
            read_array(tmp_path / name)


def test_a_long_text_does_not_pad_the_others() -> None:
    batches = text_batches([*TEXTS, " ".join("a" * 50)], tokenizer())
    assert sorted(batch["input_ids"].shape for batch in batches) == [(1, 50), (3, 2), (3, 5)]
