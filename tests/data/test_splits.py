"""Data of every kind, dealt out: labels kept beside their examples, data sets with columns, rows of model inputs."""

import json

import datasets
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hpr.checkpoints.open import open_model
from hpr.data.batches import Batches, array_batches, in_input_order, input_batches, labelled
from hpr.data.datasets import read_columns
from hpr.data.files import FORMATS, FileFormat, read_array, read_labels, read_texts
from hpr.data.sources import Columns, Mixture, interleaved
from hpr.data.splits import open_data, prepare, rows_of
from hpr.data.tables import Table
from hpr.errors import DataError, HprError

TEXTS = ["the layer reads", "a factor", "its text", "a layer writes the text"] * 4


def labelled_rows(batches) -> dict[tuple[int, ...], int]:
    """Tokens of each example → its label."""
    found = {}
    for batch in batches:
        for ids, mask, label in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
            found[tuple(ids[mask.bool()].tolist())] = int(label)
    return found


@pytest.mark.parametrize("kind", ["jsonl", "tsv", "csv", "datasets"])
def test_labels_stay_with_their_texts(tmp_path, folder, kind) -> None:
    opened = open_model(folder)
    labels = [len(text) % 3 for text in TEXTS]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps({"text": a, "label": b}) + "\n" for a, b in zip(TEXTS, labels, strict=True)))
    elif kind == "datasets":
        path = datasets.Dataset.from_dict({"text": TEXTS, "label": labels})
    else:
        mark = "\t" if kind == "tsv" else ","
        lines = [mark.join(("sentence", "label")), *(f"{a}{mark}{b}" for a, b in zip(TEXTS, labels, strict=True))]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    splits = prepare(path, opened, labels=True)
    expected = {tuple(opened.tokenizer(text)["input_ids"]): label for text, label in zip(TEXTS, labels, strict=True)}
    for part in (splits.calibration, splits.rescoring, splits.heldout):
        assert labelled_rows(part).items() <= expected.items()
    assert "labels" not in prepare(path, opened).calibration[0]


def test_labels_that_are_none(tmp_path, folder) -> None:
    opened = open_model(folder)
    with pytest.raises(HprError, match="the texts given has none: set their weight to 0, or give a column 'label'"):
        prepare(TEXTS, opened, labels=True)
    path = tmp_path / "rows.tsv"
    path.write_text("text\tlabel\nthe layer\tgood\n", encoding="utf-8")
    with pytest.raises(HprError, match="row 2, column 'label': the label 'good' is no number"):
        read_labels(path)
    path.write_text("text\tlabel\nthe layer\tnan\n", encoding="utf-8")
    with pytest.raises(HprError, match="not finite"):
        read_labels(path)
    path.write_text("text\tlabel\n\t1\nthe layer\t0\n", encoding="utf-8")
    with pytest.raises(HprError, match="1 examples and 2 labels"):
        rows_of(path, labels=True)


def test_scores_stay_scores(tmp_path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text("text\tlabel\none\t2.5\ntwo\t3.0\n", encoding="utf-8")
    assert [type(value) for value in read_labels(path)] == [float, float]
    path.write_text("text\tlabel\none\t2\n", encoding="utf-8")
    assert [type(value) for value in read_labels(path)] == [int]


def test_data_sets_with_inputs_instead_of_text(folder) -> None:
    ids = [[1, 5, 7], [1, 6], *[[1, 5, 6, 7]] * 14]
    data = datasets.Dataset.from_dict({"input_ids": ids, "name": ["x"] * 16, "label": [0, 1] * 8})
    rows, _, labels = read_columns(data)
    assert (set(rows[0]), labels) == ({"input_ids"}, None)
    splits = prepare(data, open_model(folder), labels=True)
    assert set(splits.calibration[0]) == {"input_ids", "attention_mask", "labels"}
    with pytest.raises(HprError, match="has no column 'text' or 'sentence', it has 'name', 'size'"):
        read_columns(datasets.Dataset.from_dict({"name": ["x"], "size": [True]}))
    with pytest.raises(HprError, match="is empty"):
        read_columns(datasets.Dataset.from_dict({"text": []}))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(1, 7))
def test_rows_of_inputs_are_filled_up_on_the_right(lengths: list[int], batch_size: int) -> None:
    rows = [{"input_ids": list(range(1, length + 1)), "labels": [3] * length} for length in lengths]
    batches = input_batches(rows, batch_size)
    found = [
        (ids[mask.bool()].tolist(), labels[mask.bool()].tolist(), labels[~mask.bool()].tolist())
        for batch in batches
        for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True)
    ]
    assert [part[:2] for part in found] == [(row["input_ids"], row["labels"]) for row in rows]
    assert all(value == -100 for _, _, rest in found for value in rest)


def test_rows_of_inputs_with_other_columns() -> None:
    with pytest.raises(HprError, match="row 1 has columns"):
        input_batches([{"input_ids": [1]}, {"input_values": [1.0]}])


def test_arrays_as_they_are(folder) -> None:
    splits = prepare(np.full((16, 5), 3), open_model(folder))
    assert splits.source == "the array given"
    assert torch.equal(splits.heldout[0]["input_ids"], torch.full((2, 5), 3))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 3))
def test_sources_are_interleaved_and_keep_their_order(sizes: list[int], batch_size: int) -> None:
    parts = [array_batches(np.arange(size) + 100 * number, batch_size=batch_size) for number, size in enumerate(sizes)]
    whole = interleaved(parts)
    expected = torch.cat([torch.arange(size) + 100 * number for number, size in enumerate(sizes)])
    assert torch.equal(in_input_order(torch.cat([batch["input"] for batch in whole]), whole), expected)
    for number, part in enumerate(parts):  # every source is spread over all of it
        places = [place for place, batch in enumerate(whole) if int(batch["input"][0]) // 100 == number]
        assert len(places) == len(part)
        assert places[0] < len(whole) / len(part) + len(sizes)


def test_several_sources_share_the_limits(folder) -> None:
    opened = open_model(folder)
    data = {"few": ["a layer"] * 40, "many": ["the text"] * 80}
    mixed = Mixture(data, {"few": 1, "many": 3})
    whole = prepare(mixed, opened, 32)
    assert [len(part.calibration.order) for part in whole.parts.values()] == [8, 24]
    assert sorted(whole.calibration.order) == list(range(32))
    assert [len(prepare(source, opened, 32, share=0.25).calibration.order) for source in data.values()] == [8, 8]
    batches, label = open_data(data, opened, examples=20)
    assert sorted(batches.order) == [*range(10), *range(10, 20)]
    assert label == "the texts given, the texts given"
    assert sorted(len(batch["input_ids"]) for batch in open_data(mixed, opened, examples=20)[0]) == [5, 15]
    with pytest.raises(HprError, match=r"shares \{'few': 1\} must be above 0, one for each of few, many"):
        Mixture(data, {"few": 1})
    for read in (open_data, prepare):
        with pytest.raises(HprError, match="without a source"):
            read({}, opened)


def test_a_file_format_is_one_reader_and_one_entry(tmp_path, folder, monkeypatch) -> None:
    opened, path = open_model(folder), tmp_path / "rows.toy"
    path.write_text(" / ".join(f"{text} = {number % 3}" for number, text in enumerate(TEXTS)), encoding="utf-8")
    with pytest.raises(DataError, match=r"has the suffix '\.toy'"):
        prepare(path, opened)

    def table(path, wanted) -> Table:
        rows = [row.split(" = ") for row in path.read_text(encoding="utf-8").split(" / ")]
        return Table(str(path), ["text", "label"], lambda index: [row[index] for row in rows], range(1, len(rows) + 1))

    toy = FileFormat(table=table)
    monkeypatch.setitem(FORMATS, ".toy", toy)
    made = prepare(path, opened, labels=True)
    assert made.source == "rows.toy"
    expected = {(tuple(opened.tokenizer(text)["input_ids"]), number % 3) for number, text in enumerate(TEXTS)}
    parts = [labelled_rows(part) for part in (made.calibration, made.rescoring, made.heldout)]
    assert {row for part in parts for row in part.items()} <= expected
    assert sum(len(part.order) for part in (made.calibration, made.rescoring, made.heldout)) == len(TEXTS)
    monkeypatch.setitem(FORMATS, ".toy", FileFormat(array=lambda path, key: np.full((16, 5), 3)))
    assert torch.equal(prepare(path, opened).heldout[0]["input_ids"], torch.full((2, 5), 3))


def test_a_format_says_what_it_does_not_hold(tmp_path) -> None:
    for read, name, message in ((read_texts, "x.npy", "holds an array"), (read_array, "x.csv", "holds texts")):
        with pytest.raises(HprError, match=message):
            read(tmp_path / name)


def ids_in(batches) -> set[int]:
    return {int(row[0]) for batch in batches for row in batch["input_ids"]}


def test_one_reading_serves_the_profile_and_healing(folder) -> None:
    opened, data = open_model(folder), np.arange(800)[:, None] * np.ones((1, 3), int)
    made = prepare(data, opened, 64)
    assert ids_in(made.calibration) == set([place for place in range(800) if place % 8 not in (1, 3)][:64])
    assert ids_in(made.rescoring) == set(range(1, 512, 8))
    assert ids_in(made.heldout) == set(range(3, 512, 8))
    training, validation = ids_in(made.training), ids_in(made.validation)
    assert ids_in(made.calibration) < training
    assert (len(training), len(validation)) == (600 - 67, 67)  # an eighth of the 536 that the profile leaves
    for other in (made.calibration, made.training, made.rescoring, made.heldout):
        assert not validation & ids_in(other)
    assert prepare(made, opened) is made


def test_small_data_has_no_validation_part_of_its_own(folder) -> None:
    made = prepare(np.ones((80, 3), int), open_model(folder), 32)
    assert made.validation is made.rescoring
    assert len(made.training.order) == 60


def test_labels_are_one_for_each_example() -> None:
    batches = Batches([{"input": torch.arange(2)}, {"input": torch.arange(1)}], [2, 0, 1])
    assert [batch["labels"].tolist() for batch in labelled(batches, [5, 6, 7])] == [[7, 5], [6]]
    assert "labels" not in batches[0]
    with pytest.raises(DataError, match="2 labels for 3 examples"):
        labelled(batches, [5, 6])


def test_a_mixture_is_data_like_any_other(folder) -> None:
    files = {"few": ["a layer"] * 40, "many": ["the text"] * 80}
    made = prepare(Mixture(files, {"few": 1, "many": 3}), open_model(folder), 32)
    assert [len(part.calibration.order) for part in made.parts.values()] == [8, 24]
    assert len(made.calibration.order) == 32
    assert made.shares == {"few": 1, "many": 3}
    with pytest.raises(HprError, match="one for each of few, many"):
        Mixture(files, {"few": 1})


def test_columns_are_data_like_any_other(tmp_path, folder) -> None:
    opened, path = open_model(folder), tmp_path / "rows.csv"
    path.write_text("\n".join(["review;stars", *(f"{text};{len(text) % 3}" for text in TEXTS)]), encoding="utf-8")
    data = datasets.Dataset.from_dict({"body": TEXTS, "mark": [len(text) % 3 for text in TEXTS]})
    files = {"file": Columns(path, "review", "stars"), "set": Columns(data, column=0, label="mark")}
    for source in (*files.values(), files, Mixture(files, {"file": 1, "set": 3})):
        made = prepare(source, opened, labels=True)
        expected = {tuple(opened.tokenizer(text)["input_ids"]): len(text) % 3 for text in TEXTS}
        for part in (made.calibration, made.rescoring, made.heldout):
            assert labelled_rows(part).items() <= expected.items()
        assert open_data(source, opened, examples=4)[0]


def test_batches_are_data_like_any_other(folder) -> None:
    """A list of batches, or what gives batches only once, serves every use; rows of inputs stay rows."""
    opened = open_model(folder)
    batches = [{"input_ids": torch.full((2, 3 + number % 2), number % 5)} for number in range(16)]
    splits = prepare(iter(batches), opened)
    kept = [int(batch["input_ids"][0, 0]) for batch in splits.calibration]
    assert kept == [number % 5 for number in range(16) if number % 8 not in (1, 3)]
    assert len(splits.rescoring) == len(splits.heldout) == 2
    read, label = open_data((batch for batch in batches), opened)
    assert label == "16 batches"
    assert all(torch.equal(one["input_ids"], other["input_ids"]) for one, other in zip(read, batches, strict=True))
    with pytest.raises(DataError, match="7 batches are too few"):
        prepare(batches[:7], opened)
    rows, _ = open_data([{"input_ids": torch.tensor([1, 2, 3])}] * 4, opened)
    assert rows[0]["input_ids"].shape == (4, 3)
