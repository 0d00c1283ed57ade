"""Folders of sentence-transformers: the class that their modules read is opened, and what is written loads again the same."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from conftest import low_rank_terms, plan_of
from hpr.anatomy.describe import describe
from hpr.checkpoints import save
from hpr.checkpoints.open import open_model
from hpr.errors import CheckpointError
from hpr.sharing.share import share

sentence_transformers = pytest.importorskip("sentence_transformers")
TEXTS = ["the layer reads its text", "a factor"]


def embedded(model: Any) -> torch.Tensor:
    if type(model).__name__ == "CrossEncoder":
        return torch.as_tensor(model.predict([tuple(TEXTS)]))
    found = model.encode(TEXTS, convert_to_tensor=True)
    return found.to_dense() if found.is_sparse else found


def dense_after_pooling(source: Path) -> Any:
    from sentence_transformers.base.modules import Dense, Normalize
    from sentence_transformers.sentence_transformer.modules import Pooling

    body = sentence_transformers.SentenceTransformer(str(source), device="cpu")[0]
    return sentence_transformers.SentenceTransformer(modules=[body, Pooling(16, "cls"), Dense(16, 8), Normalize()])


def of_kind(name: str) -> Callable[[Path], Any]:
    return lambda source: getattr(sentence_transformers, name)(str(source), device="cpu")


def old_layout(folder: Path, kind: str) -> None:
    """Move the Transformer into a folder of its own, name the modules as older versions do, and take the task away."""
    inner = folder / "0_Transformer"
    inner.mkdir()
    modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
    for file in [file for file in folder.iterdir() if file.is_file()]:
        if file.name not in ("modules.json", "config_sentence_transformers.json"):
            shutil.move(file, inner)
    for module in modules:
        module["type"] = f"sentence_transformers.{kind}models.{module['type'].rpartition('.')[2]}"
    modules[0]["path"] = inner.name
    if kind:
        modules[0]["type"] = "sentence_transformers.sparse_encoder.models.MLMTransformer"
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    (inner / "sentence_bert_config.json").write_text('{"max_seq_length": 20, "do_lower_case": false}', encoding="utf-8")


CASES = {
    "bi-encoder": (tf.BertModel, of_kind("SentenceTransformer"), None, "embedding"),
    "older bi-encoder": (tf.BertModel, of_kind("SentenceTransformer"), "", "embedding"),
    "dense": (tf.BertModel, dense_after_pooling, None, "cls-embedding"),
    "cross-encoder": (tf.BertForSequenceClassification, of_kind("CrossEncoder"), None, "classification"),
    "sparse encoder": (tf.BertForMaskedLM, of_kind("SparseEncoder"), None, "masked-lm"),
    "older sparse encoder": (tf.BertForMaskedLM, of_kind("SparseEncoder"), "sparse_encoder.", "masked-lm"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_class_that_the_modules_read_is_opened_and_saved(tmp_path, folder, random_fit, case) -> None:
    kind, wrapped, old, objective = CASES[case]
    torch.manual_seed(0)
    model = kind(tf.BertConfig.from_pretrained(folder, num_labels=3))
    model.save_pretrained(folder)
    source, target = tmp_path / "source", tmp_path / "target"
    made = wrapped(folder)
    made.save_pretrained(str(source))
    if old is not None:
        old_layout(source, old)
    opened = open_model(source, "cpu")
    assert (type(opened.model), opened.objective) == (kind, objective)
    site = "encoder.layer.0.output.dense"
    student = share(opened.model, plan_of(describe(opened.model), {site: low_rank_terms(site)}))
    save.save(student, target, opened.tokenizer, source=opened.folder)
    expected = type(made)(str(source), device="cpu")
    before = embedded(expected)
    expected[0].model = student.eval()
    loaded = embedded(type(made)(str(target), device="cpu"))
    assert torch.equal(loaded, embedded(expected))
    assert not torch.equal(loaded, before)
    assert type(open_model(target, "cpu").model) is kind


def test_t5_is_read_without_its_decoder(tmp_path, folder, build) -> None:
    build("t5").save_pretrained(tmp_path / "t5")
    for file in folder.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "t5")
    of_kind("SentenceTransformer")(tmp_path / "t5").save_pretrained(str(tmp_path / "encoder"))
    assert type(open_model(tmp_path / "encoder", "cpu").model) is tf.T5EncoderModel
    shutil.copy(tmp_path / "t5" / "model.safetensors", tmp_path / "encoder")
    shutil.copy(tmp_path / "t5" / "config.json", tmp_path / "encoder")
    assert type(open_model(tmp_path / "encoder", "cpu").model) is tf.T5EncoderModel


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("custom_st.Transformer", r"needs its own code \(custom_st\.Transformer"),
        ("sentence_transformers.base.modules.router.Router", "is a Router, not a Transformer"),
        ("sentence_transformers.models.StaticEmbedding", "is a StaticEmbedding, not a Transformer"),
    ],
)
def test_modules_that_are_not_read(folder, kind, message) -> None:
    (folder / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": kind}]), encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        open_model(folder, "cpu")


def test_a_bi_encoder_leaves_the_head_of_a_language_model_out(tmp_path, folder, build, caplog) -> None:
    of_kind("SentenceTransformer")(folder).save_pretrained(str(tmp_path / "source"))
    build("bert", tf.AutoModelForMaskedLM).save_pretrained(tmp_path / "source")
    with caplog.at_level("WARNING", logger="hpr"):
        opened = open_model(tmp_path / "source", "cpu")
    assert (type(opened.model), opened.objective) == (tf.BertModel, "embedding")
    assert "does not take cls.predictions.bias" in caplog.text


def test_paths_of_modules_stay_inside_the_folder(folder) -> None:
    modules = [{"path": "", "type": "sentence_transformers.models.Transformer"}]
    modules += [{"path": "../elsewhere", "type": "sentence_transformers.models.Dense"}]
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"'\.\./elsewhere', which lies outside the folder"):
        open_model(folder, "cpu")
