"""Tables that a class of transformers fills itself, by their shape, can be shared, saved and loaded."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as tf

from conftest import plan_everything
from hpr.anatomy.describe import describe
from hpr.anatomy.swappable import not_swappable
from hpr.nn.bank import terms_of
from hpr.plans.plan import Plan
from hpr.plans.terms import KEEP, Entry
from hpr.sharing.share import share

LAYERS = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
TWO_STACKS = LAYERS | {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
TOKENS = {"vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
MODELS = {
    "whisper": lambda: tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(**TWO_STACKS, **TOKENS, max_source_positions=20, max_target_positions=20, num_mel_bins=8)
    ),
    "marian": lambda: tf.MarianMTModel(tf.MarianConfig(**TWO_STACKS, **TOKENS, max_position_embeddings=20)),
    "distilbert": lambda: tf.DistilBertForMaskedLM(
        tf.DistilBertConfig(
            vocab_size=40, dim=16, n_layers=1, n_heads=2, hidden_dim=16, sinusoidal_pos_embds=True, max_position_embeddings=20
        )
    ),
    "xlm": lambda: tf.XLMWithLMHeadModel(
        tf.XLMConfig(vocab_size=40, emb_dim=16, n_layers=1, n_heads=2, sinusoidal_embeddings=True, max_position_embeddings=20)
    ),
    "informer": lambda: tf.InformerModel(
        tf.InformerConfig(**TWO_STACKS, prediction_length=4, context_length=8, lags_sequence=[1, 2])
    ),
}


def with_kept(plan: Plan, kept: dict[str, str]) -> Plan:
    return replace(plan, entries=plan.entries | {name: Entry(KEEP) for name in kept})


@pytest.mark.parametrize("family", MODELS)
def test_a_table_that_was_shared_is_loaded_as_it_was_saved(family: str, tmp_path: Path, random_fit: None) -> None:
    built = MODELS[family]()
    built.save_pretrained(tmp_path / "original")
    model = type(built).from_pretrained(tmp_path / "original").eval()  # its fixed tables take gradients now
    plan = with_kept(plan_everything(model), not_swappable(model, describe(model)))
    student = share(model, plan)
    student.save_pretrained(tmp_path / "shared")
    assert any("position" in path for path in terms_of(student))
    loaded = type(built).from_pretrained(tmp_path / "shared")
    expected, found = student.state_dict(), loaded.state_dict()
    assert expected.keys() == found.keys()
    assert not [name for name in expected if not torch.equal(expected[name], found[name])]
    assert "initialize_weights" not in vars(loaded)
