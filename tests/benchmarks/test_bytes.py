"""What the scripts about bytes count, on tiny models and made-up rows."""

import pytest
import torch
import transformers as tf

from common.speech import transcribed
from predicted_bytes import summary


def test_a_constant_factor_is_mended_and_ranks_are_kept() -> None:
    rows = [
        {"model": "tiny", "temperature": 1.0, "predicted": size, "measured": 3 * size * extra}
        for size, extra in ((0.1, 1.0), (0.2, 1.0), (0.4, 1.0), (0.8, 2.0))
    ]
    found = summary(rows)
    assert found["rank correlation"] == 1
    assert found["median ratio"] == pytest.approx(3)
    assert found["farthest"] == pytest.approx(6)
    assert found["corrected median"] == pytest.approx(1)
    assert found["corrected farthest"] == pytest.approx(2)


def test_own_transcripts_are_what_the_model_predicts_next() -> None:
    torch.manual_seed(3)
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    lengths = {"max_source_positions": 20, "max_target_positions": 64, "num_mel_bins": 8, "vocab_size": 40}
    tokens = {"pad_token_id": 2, "bos_token_id": 2, "eos_token_id": 2, "decoder_start_token_id": 3}
    config = tf.WhisperConfig(d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, init_std=1.0, **layers, **lengths, **tokens)
    model = tf.WhisperForConditionalGeneration(config).eval()
    settings = model.generation_config
    settings.no_timestamps_token_id, settings.is_multilingual, settings.max_length = 4, False, 12
    settings.suppress_tokens, settings.begin_suppress_tokens = [3, 4], None
    batch = transcribed(model, torch.randn(3, 8, 40))
    assert batch["decoder_input_ids"][:, :2].tolist() == [[3, 4]] * 3
    counted = batch["labels"] != -100
    assert not counted[:, 0].any()  # the token for "no timestamps" is given
    with torch.no_grad():
        logits = model(**batch).logits
    logits[..., settings.suppress_tokens] = -torch.inf
    predicted = logits.argmax(-1)
    written = counted & (batch["labels"] != 2) & (torch.arange(counted.shape[1]) < 9)  # later ones belong to a second window
    assert torch.equal(predicted[written], batch["labels"][written])
