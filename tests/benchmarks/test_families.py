"""The sweep: a tiny model of any architecture is built from its configuration and keeps every promise of docs/families.md."""

import pytest
import transformers as tf

import families
from common.families_table import reason, table
from common.promises import PROMISES
from common.tiny_models import tiny
from hpr.errors import HprError

FAMILIES = {one.name: one for one in families.architectures()}
SOME = (
    "BertForMaskedLM",
    "DebertaV2ForTokenClassification",
    "GPT2LMHeadModel",
    "LlamaForCausalLM",
    "LlavaForConditionalGeneration",
    "MixtralForCausalLM",
    "Qwen2VLForConditionalGeneration",
    "T5ForConditionalGeneration",
    "ViTForImageClassification",
    "Wav2Vec2ForCTC",
    "WhisperForConditionalGeneration",
)


@pytest.mark.parametrize("name", SOME)
def test_an_architecture_keeps_every_promise(name: str) -> None:
    row = families.examine(FAMILIES[name])
    assert (row["outcome"], row["reason"]) == ("passes", "")
    assert row["kept"].keys() == PROMISES.keys()
    assert row["shared"] > 0
    assert (row["kept"]["cache"] is True) == getattr(tf, name).can_generate()


def test_every_class_of_the_auto_classes_is_there_once_and_every_type_comes_first() -> None:
    listed = families.architectures()
    assert len(listed) == len({one.name for one in listed}) > 1000
    types = {one.kind for one in listed}
    assert {one.kind for one in listed[: len(types)]} == types


@pytest.mark.parametrize("kind", [tf.LlamaConfig, tf.Qwen2MoeConfig, tf.T5Config, tf.SwinConfig])
def test_a_configuration_becomes_small(kind: type) -> None:
    config = tiny(kind)
    numbers = {key: value for key, value in config.to_dict().items() if isinstance(value, int) and key in kind().to_dict()}
    assert max(numbers.values()) <= 256
    assert isinstance(config, kind)


def test_sub_configurations_become_small_too_and_agree_on_special_tokens() -> None:
    config = tiny(tf.LlavaConfig)
    assert config.text_config.hidden_size == config.vision_config.hidden_size == 32
    assert config.image_token_index < config.text_config.vocab_size == 96


def test_hybrid_models_keep_one_layer_of_each_kind() -> None:
    assert set(tiny(tf.Qwen3NextConfig).layer_types) == {"linear_attention", "full_attention"}


@pytest.mark.parametrize(
    ("error", "outcome"), [(HprError("too few layers: give two"), "refused"), (KeyError("weight"), "crashes")]
)
def test_a_failure_is_a_row_that_says_whether_it_was_worded(monkeypatch, error: Exception, outcome: str) -> None:
    def fail(*given: object) -> None:
        given[2].stage = "share"  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr(families, "check", fail)
    row = families.examine(FAMILIES["BertForMaskedLM"])
    assert (row["outcome"], row["stage"]) == (outcome, "share")
    assert str(error) in row["reason"]


def test_a_process_that_dies_is_a_row(monkeypatch) -> None:
    monkeypatch.setattr(families, "examine", lambda architecture: families.os._exit(3))
    rows = list(families.rows_of([FAMILIES["BertForMaskedLM"], FAMILIES["GPT2LMHeadModel"]], jobs=2))
    assert [row["outcome"] for row in rows] == ["crashes", "crashes"]
    assert "code 3" in rows[0]["reason"]


def test_the_page_counts_outcomes_and_groups_reasons() -> None:
    def row(name: str, **more: object) -> dict:
        return {"name": name, "kind": name.lower(), "task": "base", "shared": 1, "kept": {}, "reason": "", **more}

    rows = [
        row("A", outcome="passes", kept={"plan": True}),
        row("B", outcome="not built", reason="ImportError: \nB requires the timm library but it was not found"),
        row("C", outcome="not built", reason="ImportError: \nC requires the timm library but it was not found"),
        row("D", outcome="differs", kept={"plan": True, "cache": False}),
    ]
    page = table(rows, "in a minute", 5)
    assert "4 of the 5 classes were run" in page
    assert "| were run | 4 | 4 |" in page
    assert "| are built | 2 | 2 |" in page
    assert "- needs the package timm: `B`, `C`" in page
    assert "- base: `A`" in page
    assert reason(rows[3]) == f"not {PROMISES['cache']}"
