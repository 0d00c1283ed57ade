"""Tiny models of any architecture of Transformers: the defaults of its configuration, shrunk by the names of its numbers.

No architecture has code here. A number is shrunk by what its name says it counts (layers, heads, widths, positions), in every
sub-configuration alike, so that widths that must agree still do. ``EXCEPTIONS`` names the few numbers that this gets wrong.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Set
from dataclasses import fields
from typing import Any

import transformers as tf

VOCABULARY = 96
WIDTH = 32
IMAGE = 32
POSITIONS = 64

# What a number counts, by its name; the first rule that matches counts, and no number grows. None: it stays.
RULES: tuple[tuple[str, int | None], ...] = tuple(
    (rf"(?:^|_)(?:{names})$", value)
    for names, value in (
        (
            r"kernel|kernel_size|kernel_dim|stride|padding|ratio|factor|rate|coefficient|cost|expand|num_channels|"
            r"pretraining_tp",
            None,
        ),
        (
            r"vocab_size|vocab|vocab_size_per_layer_input|num_embeddings|num_buckets|hash_buckets|n_token|"
            r"num_codevectors_per_group",
            VOCABULARY,
        ),
        (r"codebook_size", 64),
        (r"kv_shared_layers", 0),
        (r"upsample_groups", WIDTH),
        (r"hidden_size_per_layer_input", 8),
        (r"num_key_value_heads|num_kv_heads|kv_n_heads|num_key_heads|n_groups?|num_query_groups", 2),
        (r"heads?|n_heads?|attn_heads|heads_ipa", 4),
        (
            r"(?:num_)?(?:hidden_|add_)?layers?|n_layers?|depth|[lrx]_layers|num_blocks|num_hidden_groups|"
            r"H_cycles|L_cycles",
            2,
        ),
        (r"num_nextn_predict_layers|num_mtp_layers", 1),
        (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts|expert_num", 4),
        (r"experts_per_tok(?:en)?|topk|top_k|moe_k|num_experts_per_token", 2),
        (r"topk_group|n_shared_experts|num_shared_experts|first_k_dense_replace|num_dense_layers", 1),
        (r"period|interval|sparse_step|layer_step|every_n_layers|frequency|group_size", 2),
        (r"offset", 1),
        (r"head_dim|d_head|dim_head|d_kv|key_dim|kv_channels|head_size|rotary_dim|d_rel|head_hidden_dim", 8),
        (r"lora_rank|rank|d_state|state_size", 8),
        (
            r"moe_intermediate_size|expert_intermediate_size|expert_ffn_hidden_size|shared_intermediate_size|"
            r"moe_hidden_size",
            WIDTH,
        ),
        (
            r"intermediate_(?:size|dim)|\w*ffn_\w*(?:dim|size)|ffn_dim|feedforward_dim|mlp_dim|d_ff|dff|dim_ff|"
            r"d_inner|mlp_hidden_size|dim_feedforward|linear_units",
            2 * WIDTH,
        ),
        (
            r"source_positions|target_positions|\w*position_embeddings|n_positions|max_\w*len(?:gth)?|n_ctx|"
            r"context_length|seq_length|max_pos_emb",
            POSITIONS,
        ),
        (r"image_size|resolution|spec_size|crop_size|max_img_size|input_size|max_image_size", IMAGE),
        (r"patch_size", 8),
        (
            r"sliding_window|window_size|attention_window|local_attention|chunk_size|block_size|window_len|"
            r"local_radius|horizon_length",
            16,
        ),
        (r"mel_bins|num_filters|mel_dim|feature_size|input_dim", 16),
        (
            r"num_queries|num_proposals|num_denoising|query_tokens|num_latents|n_latents|query_num|num_points|"
            r"query_tokens",
            8,
        ),
        (r"conv_pos_embeddings|num_conv_pos_embedding_groups", 4),
        (r"num_frames", 4),
        (r"\w*(?:dim|dims|size|width|channels|units|d_model|n_embd|embd|channel_size|inplanes)", WIDTH),
    )
)  # fmt: skip
TOKEN = re.compile(r"(?:_token_id|_token_index|_token|_id|_ids|_index)$")
KEPT = {"id2label", "label2id", "architectures", "dtype", "transformers_version", "type_vocab_size", "type_vocab_sizes"}
OPEN = {"head_dim": 8, "vocab_size": VOCABULARY}  # fields that some configurations leave open though their models need them
STAGES = {"hidden_sizes", "depths", "num_heads", "decoder_hidden_size"}  # lists that are derived where they are left open
# Numbers that the rules get wrong, by the type of the configuration.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 8, "attn_layer_indices": [1]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 8, "layer_types": ["mamba", "attention"]},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_ssm": 32},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "nemotron": {"num_key_value_heads": 2},
    "esm": {"vocab_size": 96, "pad_token_id": 1, "mask_token_id": 3},
    "gemma3n_text": {"laurel_rank": 8, "num_kv_shared_layers": 0, "intermediate_size": 64},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}},
    "cosmos3_edge_text": {
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 1, 1],
            "mrope_interleaved": True,
        }
    },
    "glm5_next_text": {"index_kpool": 2, "index_topk": 8},
    "molmo2_adapter": {"vision_feature_layer": [-1, -2]},
    "fun_asr_nano_adapter": {"intermediate_size": 8},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "step3p7_text": {"sliding_window": 16},
    "hunyuan_vl_text": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "xdrope_section": [1, 1, 1, 1], "alpha": 1.0}
    },
    "mobilenet_v1": {"depth_multiplier": 0.25},
    "mobilenet_v2": {"depth_multiplier": 0.35},
    "focalnet": {"embed_dim": 16, "hidden_sizes": [16, 16, 32, 32]},
    "hiera": {"embed_dim": 16},
    "segformer": {"decoder_hidden_size": 32, "num_attention_heads": [1, 2, 2, 2]},
    "swin2sr": {"num_heads": [2, 2]},
    "seggpt": {"num_hidden_layers": 4, "merge_index": 0, "intermediate_hidden_state_indices": [1, 2, 3]},
    "maskformer": {"fpn_feature_size": 32, "mask_feature_size": 32},
    "lw_detr_vit": {"num_windows": 4, "window_block_indices": [0]},
    "donut-swin": {"num_heads": [2, 2, 4, 4]},
    "swinv2": {"num_heads": [2, 2, 4, 4]},
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": [4, 4],
        "axial_pos_embds_dim": [16, 16],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_hidden_layers": 2,
        "attn_layers": ["local", "lsh"],
        "hidden_size": 32,
    },
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 16, "lru_width": 32},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "lfm2_moe": {"layer_types": ["full_attention", "conv"]},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "ngram_vocab_size_base": 96,
    },
    "xmod": {"default_language": "en_XX"},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
        }
    },
    "chameleon": {"vocabulary_map": {"<image>": 70, **{f"IMGIMG{chr(65 + number)}Z": 71 + number for number in range(8)}}},
    "bit": {"hidden_sizes": [32, 32, 64, 64], "embedding_size": 32},
    "cvt": {"num_heads": [1, 2, 2], "embed_dim": [16, 32, 32], "depth": [1, 1, 2], "num_hidden_layers": 4},
    "ernie4_5_vl_moe_text": {"num_hidden_layers": 2, "mlp_layer_types": ["dense", "sparse"]},
    "autoformer": {"prediction_length": 8, "context_length": 16},
    "informer": {"prediction_length": 8, "context_length": 16},
    "time_series_transformer": {"prediction_length": 8, "context_length": 16},
    "bridgetower_text_model": {"num_attention_heads": 4},
    "neomme": {"head_dim": 16},
    "perceiver": {"num_latents": 8, "d_latents": 32, "num_blocks": 1},
}


def tiny(kind: type, **given: Any) -> tf.PreTrainedConfig:
    """A configuration of a class with small numbers, and sub-configurations alike; ``given`` are set as they are."""
    config = _small(kind(), frozenset(), given)
    if hasattr(config, "pad_token_id") and config.pad_token_id is None:
        config.pad_token_id = 0
    return config


def _small(default: tf.PreTrainedConfig, spelled: Set[str], given: Mapping[str, Any]) -> tf.PreTrainedConfig:
    """The configuration made small. Fields that the class leaves open (None) are open again, unless they are ``spelled``."""
    kind = type(default)
    changed: dict[str, Any] = _per_layer(default)
    for field in fields(kind):
        name, value = field.name, _value(default, field.name)
        if isinstance(value, tf.PreTrainedConfig):
            spec = kind.sub_configs_defaults.get(name)
            changed[name] = _small(value, set(spec.init_kwargs) if spec else set(), {})
        elif name in changed or name in KEPT:
            continue
        elif name in spelled or field.default is not None:
            latent = name == "num_key_value_heads" and "qk_rope_head_dim" in kind.__dataclass_fields__
            changed[name] = shrunk("num_heads" if latent else name, value)
        elif name in STAGES and isinstance(value, list):
            changed[name] = shrunk(name, value)
        elif name in OPEN and "qk_rope_head_dim" not in kind.__dataclass_fields__:
            changed[name] = OPEN[name]
    if "mrope_section" in (getattr(kind, "ignore_keys_at_rope_validation", None) or ()):
        changed["rope_parameters"] = _axes(default)
    return kind(**changed | EXCEPTIONS.get(kind.model_type, {}) | given)


def _axes(config: Any) -> dict[str, Any]:
    """Rotary positions of several axes, which share the half of a head that is turned."""
    known = {key: value for key, value in (config.rope_parameters or {}).items() if not isinstance(value, dict)}
    half = int(OPEN["head_dim"] * known.get("partial_rotary_factor", 1.0)) // 2
    section = [half - 2 * (half // 3), half // 3, half // 3]
    return {"rope_type": "default", "rope_theta": 10000.0} | known | {"mrope_section": section}


def _value(config: tf.PreTrainedConfig, name: str) -> Any:
    """A field's value as the whole configuration has it: some hold one for each layer as well, and refuse to be asked."""
    return config.__dict__.get(type(config).attribute_map.get(name, name))


def _per_layer(config: tf.PreTrainedConfig) -> dict[str, Any]:
    """Fields with an entry for each layer, cut to one layer of each kind, and to two at least."""
    named = type(config).attribute_map.get("num_hidden_layers", "num_hidden_layers")
    count = _value(config, named)
    lists = {
        field.name: value
        for field in fields(config)
        if isinstance(value := _value(config, field.name), list | tuple) and len(value) == count and field.name not in KEPT
    }
    if not lists or not isinstance(count, int) or count < 3:
        return {}
    kinds = [repr([value[layer] for value in lists.values()]) for layer in range(count)]
    chosen = sorted({kinds.index(one) for one in kinds})[:4]
    chosen = sorted({*chosen, chosen[-1] + 1 if chosen[-1] + 1 < count else chosen[-1] - 1}) if len(chosen) < 2 else chosen
    return {named: len(chosen)} | {name: [value[layer] for layer in chosen] for name, value in lists.items()}


def shrunk(name: str, value: Any) -> Any:
    """A number, or a list of them, made small by its name. Never larger than it was."""
    if isinstance(value, list | tuple):
        return type(value)(shrunk_item(name, number, item) for number, item in enumerate(value))
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    if TOKEN.search(name):
        return value if value < VOCABULARY else token(name)
    for pattern, limit in RULES:
        if re.search(pattern, name):
            return value if limit is None else min(value, limit)
    return value


def shrunk_item(name: str, number: int, item: Any) -> Any:
    """One item of a list: stages keep their order of widths; indices of layers stay below the layers."""
    if not isinstance(item, int) or isinstance(item, bool):
        return item
    if TOKEN.search(name):
        return item if item < VOCABULARY else token(f"{name}{number}")
    if re.search(r"ind(?:ex|exes|ices)$|hook_ids$", name):
        return min(number, 1)
    if re.search(r"depths?$|num_blocks|repeats|layers$|heads$|n_attn_blocks|block_sizes", name):
        return min(item, 2)
    if re.search(r"(?:sizes|dims?|channels|widths?)\w*$", name) and not re.search(r"kernel|patch_sizes|block", name):
        return item if item <= 16 else max(16, -(-item // 128) * 8)
    return shrunk(name, item) if re.search("image_size", name) else item


def token(name: str) -> int:
    """An id below the vocabulary for a special token, by its name: image tokens are one thing in every part of a model."""
    return 70 + zlib.crc32(re.sub(r"_(?:token_)?(?:id|index)$", "", name).encode()) % (VOCABULARY - 70)
