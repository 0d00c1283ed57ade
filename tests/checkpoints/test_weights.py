"""Weights that a folder lacks, and weights that the class does not take."""

import json
import logging
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

from hpr.checkpoints.open import open_model
from hpr.errors import CheckpointError


def without(folder: Path, part: str) -> None:
    """Take weights out of a folder."""
    weights = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in weights.items() if part not in key}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("part", ["pooler.dense.weight", "pooler"])
@pytest.mark.parametrize(
    "head", [tf.AutoModelForSequenceClassification, tf.AutoModelForNextSentencePrediction, tf.AutoModelForMultipleChoice]
)
def test_a_pooler_that_a_head_reads_must_be_there(tmp_path, build, head, part) -> None:
    build("bert", head).save_pretrained(tmp_path)
    without(tmp_path, part)
    with pytest.raises(CheckpointError, match=r"lacks the weight bert\.pooler\.dense\..* reads"):
        open_model(tmp_path, "cpu")


def test_a_pooler_that_nothing_reads_is_left_out(tmp_path, build) -> None:
    build("bert").save_pretrained(tmp_path)
    without(tmp_path, "pooler")
    opened = open_model(tmp_path, "cpu").model
    assert not [key for key in opened.state_dict() if "pooler" in key]


def test_weights_that_nothing_reads_are_the_same_at_every_load(tmp_path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 40}
    tf.LayoutLMForTokenClassification(tf.LayoutLMConfig(**sizes)).save_pretrained(tmp_path)
    without(tmp_path, "pooler")
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = open_model(tmp_path, "cpu").model
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    second = open_model(tmp_path, "cpu").model
    assert torch.equal(first.layoutlm.pooler.dense.weight, second.layoutlm.pooler.dense.weight)


@pytest.mark.parametrize("names", [None, [], ["MyBertForMaskedLM"]])
def test_a_head_that_would_be_lost_is_named_with_its_class(tmp_path, build, names) -> None:
    build("bert", tf.AutoModelForMaskedLM).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": names}), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r'cls\.predictions.*5 such.*write "architectures": \["BertForMaskedLM"\]'):
        open_model(tmp_path, "cpu")


def test_a_bare_model_needs_no_class_name(tmp_path, build) -> None:
    build("bert").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": None}), encoding="utf-8")
    assert type(open_model(tmp_path, "cpu").model) is tf.BertModel


def test_weights_that_the_named_class_does_not_take_are_named(tmp_path, build, caplog) -> None:
    build("bert", tf.AutoModelForPreTraining).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}), encoding="utf-8")
    with caplog.at_level(logging.WARNING, logger="hpr"):
        assert type(open_model(tmp_path, "cpu").model) is tf.BertForMaskedLM
    assert "BertForMaskedLM does not take bert.pooler.dense.bias (4 such weights)" in caplog.text


def test_buffers_of_older_versions_are_not_worth_a_word(tmp_path, build, caplog) -> None:
    build("bert").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["embeddings.position_ids"] = torch.arange(24)[None]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING, logger="hpr"):
        open_model(tmp_path, "cpu")
    assert caplog.text == ""


def test_a_class_that_only_its_own_module_has(tmp_path) -> None:
    sizes = {"encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 16, "max_source_positions": 20}
    encoder = type(
        tf.WhisperModel(
            tf.WhisperConfig(
                d_model=16, vocab_size=40, decoder_layers=1, num_mel_bins=8, pad_token_id=0, decoder_attention_heads=2, **sizes
            )
        ).encoder
    )
    encoder(tf.WhisperConfig(d_model=16, num_mel_bins=8, **sizes)).save_pretrained(tmp_path)
    assert type(open_model(tmp_path, "cpu").model) is encoder
