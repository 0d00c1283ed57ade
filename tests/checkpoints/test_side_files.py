"""What prepares a model's inputs goes along with the model."""

import json
from pathlib import Path

import pytest
import transformers as tf

from hpr.checkpoints import save
from hpr.checkpoints.open import open_model

SIDE = (
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "audio_tokenizer_config.json"),
    *("chat_template.jinja", "chat_template.json", "generation_config.json", "normalizer.json", "LICENSE"),
)
VOCABULARY = ("vocab.json", "merges.txt", "spiece.model", "added_tokens.json", "special_tokens_map.json", "qwen.tiktoken")
OTHERS = ("trainer_state.json", "quantize_config.json", "train.txt", "optimizer.pt", "notes.md", "modeling_mine.py")


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_text("{}", encoding="utf-8")


def names_in(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_files_of_processors_and_vocabularies_go_along(folder, tmp_path) -> None:
    opened = open_model(folder, "cpu")
    fill(folder, *SIDE, *VOCABULARY, *OTHERS)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{}", encoding="utf-8")
    target = save.save(opened.model, tmp_path / "out", opened.tokenizer, source=folder)
    assert names_in(target) >= {*SIDE, *VOCABULARY}
    assert not names_in(target) & set(OTHERS)
    assert (target / "additional_chat_templates" / "tools.jinja").is_file()


def test_the_vocabulary_of_another_tokenizer_stays_behind(folder, tmp_path) -> None:
    vocabulary = tmp_path / "words.txt"
    vocabulary.write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nmine", encoding="utf-8")
    opened = open_model(folder, "cpu", tokenizer=tf.BertTokenizer(str(vocabulary)))
    fill(folder, *SIDE, *VOCABULARY)
    target = save.save(opened.model, tmp_path / "out", opened.tokenizer, source=folder)
    assert names_in(target) >= set(SIDE)
    assert not names_in(target) & set(VOCABULARY)
    assert tf.AutoTokenizer.from_pretrained(target).convert_tokens_to_ids("mine") == 5


def test_files_that_the_model_wrote_are_not_replaced(tmp_path, build) -> None:
    model = build("gpt2", tf.AutoModelForCausalLM)
    model.save_pretrained(tmp_path / "gpt2")
    fill(tmp_path / "gpt2", "generation_config.json")
    model.generation_config.max_new_tokens = 7
    target = save.save(model, tmp_path / "out", source=tmp_path / "gpt2")
    assert json.loads((target / "generation_config.json").read_text(encoding="utf-8"))["max_new_tokens"] == 7


def test_processors_open_the_folder_that_was_written(folder, tmp_path) -> None:
    pytest.importorskip("PIL")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    tokenizer = tf.AutoTokenizer.from_pretrained(folder)
    text, vision = sizes | {"vocab_size": 40, "max_position_embeddings": 24}, sizes | {"image_size": 8, "patch_size": 4}
    model = tf.CLIPModel(tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8))
    source = tmp_path / "clip"
    model.save_pretrained(source)
    images = tf.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8}, image_mean=[0.1, 0.2, 0.3])
    tf.CLIPProcessor(images, tokenizer).save_pretrained(source)
    opened = open_model(source, "cpu")
    target = save.save(opened.model, tmp_path / "out", opened.tokenizer, source=opened.folder)
    assert list(tf.AutoProcessor.from_pretrained(target).image_processor.image_mean) == [0.1, 0.2, 0.3]
    assert tf.AutoImageProcessor.from_pretrained(target).crop_size["height"] == 8


def test_feature_extractors_of_whisper(tmp_path, build) -> None:
    source = tmp_path / "source"
    build("bart", tf.AutoModelForSeq2SeqLM).save_pretrained(source)
    tf.WhisperFeatureExtractor(feature_size=8).save_pretrained(source)
    opened = open_model(source, "cpu")
    target = save.save(opened.model, tmp_path / "out", source=opened.folder)
    assert tf.AutoFeatureExtractor.from_pretrained(target).feature_size == 8
