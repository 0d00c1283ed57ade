"""Folders that HPR does not read are told apart by their files, before weights are loaded."""

import json
import re
import shutil
from pathlib import Path

import pytest
import transformers as tf

from hpr.checkpoints.open import open_model
from hpr.errors import CheckpointError


def change(file: Path, **values: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | values), encoding="utf-8")


@pytest.fixture
def unread(monkeypatch):
    """Fails if weights are loaded, or if the terminal is asked."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("something was loaded or asked")

    monkeypatch.setattr(tf.PreTrainedModel, "from_pretrained", never)
    monkeypatch.setattr("builtins.input", never)


def refused(folder: Path, *words: str) -> None:
    with pytest.raises(CheckpointError, match="(?s)" + ".*".join(map(re.escape, words))) as caught:
        open_model(folder, "cpu")
    assert str(folder) in str(caught.value)


def test_adapters_alone_and_beside_a_model(folder, tmp_path, unread) -> None:
    alone = tmp_path / "peft"
    alone.mkdir()
    (alone / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "some/base"}', encoding="utf-8"
    )
    refused(alone, "is an adapter (LORA)", "merge it first", "some/base")
    shutil.copy(alone / "adapter_config.json", folder)
    refused(folder, "an adapter (LORA) beside it", "merge it first")
    (folder / "adapter_config.json").unlink()
    (folder / "adapter_model.safetensors").write_bytes(b"")
    refused(folder, "an adapter (PEFT) beside it")


@pytest.mark.parametrize(
    "own",
    [
        {"model_type": "mine", "auto_map": {"AutoModel": "mine.MyModel"}, "architectures": ["MyModel"]},
        {"auto_map": {"AutoModel": "mine.MyModel"}, "architectures": ["MyModel"]},
        {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MyConfig", "AutoModel": "other/repo--mine.MyModel"}},
    ],
)
def test_models_that_need_their_own_code(folder, unread, own) -> None:
    change(folder / "config.json", **own)
    refused(folder, "needs its own code", "mine.MyModel", "HPR does not run")


def test_code_beside_a_model_of_transformers_is_not_needed(folder) -> None:
    change(folder / "config.json", auto_map={"AutoModel": "mine.MyModel"}, architectures=["BertModel"])
    assert type(open_model(folder, "cpu").model) is tf.BertModel


def test_tokenizers_that_need_their_own_code(folder, unread) -> None:
    change(folder / "tokenizer_config.json", tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.Slow", None]})
    refused(folder, "tokenizer", "needs its own code (mine.Slow)", "open_model(folder, tokenizer=...)")


def test_a_tokenizer_that_is_given_replaces_one_that_cannot_be_read(folder) -> None:
    tokenizer = open_model(folder, "cpu").tokenizer
    change(folder / "tokenizer_config.json", tokenizer_class="Mine", auto_map={"AutoTokenizer": ["mine.Slow", None]})
    assert open_model(folder, "cpu", tokenizer=tokenizer).tokenizer is tokenizer


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("model-Q4_K_M.gguf", "in GGUF"),
        ("pytorch_model.bin", "pickled"),
        ("pytorch_model-00001-of-00002.bin", "pickled"),
        ("model.pt", "pickled"),
        ("consolidated.00.pth", "pickled"),
        ("last.ckpt", "pickled"),
        ("tf_model.h5", "TensorFlow"),
        ("flax_model.msgpack", "Flax"),
        ("model.onnx", "ONNX"),
        ("weights.npz", "MLX"),
        ("rust_model.ot", "Rust"),
        ("model.fp16.safetensors", "not named model.safetensors"),
    ],
)
def test_weights_in_other_formats(folder, unread, name, words) -> None:
    (folder / "model.safetensors").rename(folder / name)
    refused(folder, name, words)
    (folder / "config.json").unlink()
    refused(folder, "no config.json", name)


def test_shards_that_are_missing(folder, build, unread) -> None:
    (folder / "model.safetensors").unlink()
    build("bert").save_pretrained(folder, max_shard_size="4KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    shards[1].unlink()
    refused(folder, f"lacks {shards[1].name} (1 of {len(shards)} files")
    (folder / "model.safetensors.index.json").write_text("{}", encoding="utf-8")
    refused(folder, "lists no files of weights")


def test_files_of_another_kind_under_the_right_names(folder, unread) -> None:
    change(folder / "config.json", model_type=["bert"], auto_map={"AutoModel": "mine.MyModel"})
    refused(folder, "needs its own code")
    (folder / "config.json").unlink()
    refused(folder, "has no config.json: give a folder that save_pretrained wrote")
    (folder / "config.json").write_text("{}", encoding="utf-8")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    refused(folder, "has no model.safetensors: copy or download the whole model")
    (folder / "config.json").write_text("[]", encoding="utf-8")
    refused(folder, "config.json holds a list, not a mapping")


def test_shards_that_are_complete_are_read(folder, build) -> None:
    (folder / "model.safetensors").unlink()
    build("bert").save_pretrained(folder, max_shard_size="4KB")
    assert type(open_model(folder, "cpu").model) is tf.BertModel


def test_pointers_of_git_lfs(folder, unread) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n", encoding="utf-8")
    refused(folder, "pointer of Git LFS", "git lfs pull")


@pytest.mark.parametrize(
    ("key", "method"),
    [("quantization_config", name) for name in ("bitsandbytes", "gptq", "awq", "fp8")] + [("compression_config", "float")],
)
def test_models_that_others_quantised(folder, unread, key, method) -> None:
    change(folder / "config.json", **{key: {"quant_method": method}})
    refused(folder, f"quantised already ({method})", "give the original")


def test_gptq_beside_the_configuration(folder, unread) -> None:
    (folder / "quantize_config.json").write_text('{"bits": 4}', encoding="utf-8")
    refused(folder, "quantised already (gptq)")


def test_pipelines_of_diffusers(tmp_path, unread) -> None:
    (tmp_path / "model_index.json").write_text("{}", encoding="utf-8")
    refused(tmp_path, "pipeline of diffusers", "text_encoder")
