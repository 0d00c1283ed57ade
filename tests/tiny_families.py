"""Tiny random models of families that tests share: a class, a small configuration, and data of its kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import Tensor, nn

from hpr.runtime.hooks import run

Batch = dict[str, Tensor]

PLAIN = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 96,
    "max_position_embeddings": 24,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DECODER = {**PLAIN, "num_key_value_heads": 2}
BOTH = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 24,
    "vocab_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
VISION = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
IMAGE = {**VISION, "image_size": 16, "patch_size": 4}
SOUND = {
    **PLAIN,
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
}
CHANNELS = {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 96, "n_positions": 24, "bos_token_id": 1, "eos_token_id": 2}


def text(draw: torch.Generator) -> Batch:
    """Eight texts of 24 tokens, four of them padded on the right."""
    ids = torch.randint(3, 96, (8, 24), generator=draw)
    mask = torch.ones_like(ids)
    mask[4:, 18:] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def pairs(draw: torch.Generator) -> Batch:
    """Texts with target texts."""
    return {**text(draw), "labels": torch.randint(3, 96, (8, 24), generator=draw)}


def images(draw: torch.Generator) -> Batch:
    """Eight images of 16 by 16."""
    return {"pixel_values": torch.randn(8, 3, 16, 16, generator=draw)}


def captioned(draw: torch.Generator) -> Batch:
    """Eight images with a text each."""
    return {**text(draw), **images(draw)}


def waves(draw: torch.Generator) -> Batch:
    """Four sounds of 400 samples."""
    return {"input_values": torch.randn(4, 400, generator=draw)}


def spectra(draw: torch.Generator) -> Batch:
    """Four spectrograms with a transcript each."""
    labels = torch.randint(3, 96, (4, 24), generator=draw)
    return {"input_features": torch.randn(4, 8, 40, generator=draw), "labels": labels}


@dataclass(frozen=True)
class Family:
    """A model class, its tiny configuration and data of its kind."""

    model: str
    config: Callable[[], tf.PretrainedConfig]
    batch: Callable[[torch.Generator], Batch] = text


FAMILIES: dict[str, Family] = {
    "BERT": Family("BertForMaskedLM", lambda: tf.BertConfig(**PLAIN)),
    "RoBERTa": Family("RobertaForMaskedLM", lambda: tf.RobertaConfig(**PLAIN | {"max_position_embeddings": 27})),
    "DistilBERT": Family(
        "DistilBertForMaskedLM",
        lambda: tf.DistilBertConfig(dim=32, n_layers=3, n_heads=4, hidden_dim=64, vocab_size=96, max_position_embeddings=24),
    ),
    "ELECTRA": Family("ElectraForMaskedLM", lambda: tf.ElectraConfig(**PLAIN, embedding_size=16)),
    "MPNet": Family("MPNetForMaskedLM", lambda: tf.MPNetConfig(**PLAIN | {"max_position_embeddings": 27})),
    "DeBERTa-v2": Family(
        "DebertaV2ForMaskedLM",
        lambda: tf.DebertaV2Config(
            **PLAIN, relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=8, norm_rel_ebd="layer_norm"
        ),
    ),
    "ModernBERT": Family("ModernBertForMaskedLM", lambda: tf.ModernBertConfig(**PLAIN)),
    "ALBERT": Family("AlbertForMaskedLM", lambda: tf.AlbertConfig(**PLAIN, embedding_size=16)),
    "GPT-2": Family("GPT2LMHeadModel", lambda: tf.GPT2Config(**CHANNELS)),
    "GPT-NeoX": Family("GPTNeoXForCausalLM", lambda: tf.GPTNeoXConfig(**PLAIN)),
    "OPT": Family(
        "OPTForCausalLM",
        lambda: tf.OPTConfig(
            **{key: value for key, value in PLAIN.items() if key != "intermediate_size"}, ffn_dim=64, word_embed_proj_dim=32
        ),
    ),
    "Llama": Family("LlamaForCausalLM", lambda: tf.LlamaConfig(**DECODER)),
    "Mistral": Family("MistralForCausalLM", lambda: tf.MistralConfig(**DECODER)),
    "Qwen2": Family("Qwen2ForCausalLM", lambda: tf.Qwen2Config(**DECODER)),
    "Qwen3": Family("Qwen3ForCausalLM", lambda: tf.Qwen3Config(**DECODER, head_dim=8)),
    "Gemma": Family("GemmaForCausalLM", lambda: tf.GemmaConfig(**DECODER, head_dim=8)),
    "Phi": Family("PhiForCausalLM", lambda: tf.PhiConfig(**DECODER)),
    "Mixtral": Family("MixtralForCausalLM", lambda: tf.MixtralConfig(**DECODER, num_local_experts=4)),
    "Qwen2-MoE": Family(
        "Qwen2MoeForCausalLM",
        lambda: tf.Qwen2MoeConfig(
            **DECODER, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32
        ),
    ),
    "T5": Family(
        "T5ForConditionalGeneration",
        lambda: tf.T5Config(
            vocab_size=96, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0, pad_token_id=0
        ),
        pairs,
    ),
    "BART": Family("BartForConditionalGeneration", lambda: tf.BartConfig(**BOTH), pairs),
    "Marian": Family("MarianMTModel", lambda: tf.MarianConfig(**BOTH), pairs),
    "Whisper": Family(
        "WhisperForConditionalGeneration",
        lambda: tf.WhisperConfig(**BOTH, num_mel_bins=8, max_source_positions=20, max_target_positions=24),
        spectra,
    ),
    "ViT": Family("ViTForImageClassification", lambda: tf.ViTConfig(**IMAGE, num_labels=5), images),
    "DeiT": Family("DeiTForImageClassification", lambda: tf.DeiTConfig(**IMAGE, num_labels=5), images),
    "CLIP": Family("CLIPModel", lambda: tf.CLIPConfig(text_config=PLAIN, vision_config=IMAGE, projection_dim=16), captioned),
    "wav2vec2": Family("Wav2Vec2ForCTC", lambda: tf.Wav2Vec2Config(**SOUND), waves),
    "HuBERT": Family("HubertForCTC", lambda: tf.HubertConfig(**SOUND), waves),
}


def built(family: Family) -> nn.Module:
    """The family's tiny model in evaluation mode, the same every time."""
    torch.manual_seed(0)
    model = getattr(tf, family.model)(family.config()).eval()
    with torch.no_grad():  # fresh biases are zero and fresh norms are one: that would hide what is mixed up
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.05)
    return model


@torch.no_grad()
def answer(model: nn.Module, batch: Batch) -> Tensor:
    """The model's main output, one tensor."""
    return output_of(run(model, batch))


def output_of(outputs: Any) -> Tensor:
    """Logits where there are any."""
    for name in ("logits", "logits_per_image", "last_hidden_state"):
        if (found := getattr(outputs, name, None)) is not None:
            return found
    raise ValueError(f"{type(outputs).__name__} has no output to compare")
