"""What is left beside the sites, and the reasons given."""

from collections.abc import Callable

import pytest
import torch
import transformers as tf
from torch import nn

from hpr.anatomy.describe import describe
from hpr.anatomy.uncovered import Uncovered, uncovered

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SOUND = {"conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
EXPERTS = {**SIZES, "vocab_size": 40, "num_key_value_heads": 1, "num_local_experts": 4}
CONVOLUTION = "a convolution"
VECTOR = "a single vector, like a class token: it has no rank to lower"
OWN = "read by its module itself, past any Linear or Embedding, like a router or a table of positions"
TRANSPOSED = "experts that are stored transposed, as (in, out)"


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)
        self.mixing = nn.Parameter(torch.zeros(3, 8, 8))


class Spoken(nn.Module):
    """Like KWT: a Linear over frames, a class token, positions, blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.frames = nn.Linear(10, 8)
        self.token = nn.Parameter(torch.zeros(1, 1, 8))
        self.positions = nn.Parameter(torch.zeros(1, 21, 8))
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.table = nn.Embedding(5, 8)
        self.head = nn.Linear(8, 5)
        self.head.weight = self.table.weight


def vit() -> nn.Module:
    return tf.ViTModel(tf.ViTConfig(**SIZES, image_size=16, patch_size=4))


def wav2vec2() -> nn.Module:
    config = tf.Wav2Vec2Config(**SIZES, **SOUND, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    return tf.Wav2Vec2Model(config)


CASES: dict[str, tuple[Callable[[], nn.Module], list[Uncovered]]] = {
    "vit": (
        vit,
        [
            Uncovered("Conv2d", "weight", 1, 16 * 3 * 4 * 4, CONVOLUTION),
            Uncovered("ViTEmbeddings", "position_embeddings", 1, 17 * 16, OWN),
            Uncovered("ViTEmbeddings", "cls_token", 1, 16, VECTOR),
        ],
    ),
    "wav2vec2": (
        wav2vec2,
        [
            Uncovered("ParametrizedConv1d", "weight.original1", 1, 16 * 8 * 4, CONVOLUTION),
            Uncovered("Conv1d", "weight", 2, 8 * 10 + 8 * 8 * 3, CONVOLUTION),
            Uncovered("ParametrizedConv1d", "weight.original0", 1, 4, CONVOLUTION),
        ],
    ),
    "mixtral": (
        lambda: tf.MixtralModel(tf.MixtralConfig(**EXPERTS)),
        [Uncovered("MixtralTopKRouter", "weight", 2, 2 * 4 * 16, OWN)],
    ),
    "gpt-oss": (
        lambda: tf.GptOssModel(tf.GptOssConfig(**EXPERTS, head_dim=8, num_experts_per_tok=2)),
        [
            Uncovered("GptOssExperts", "gate_up_proj", 2, 2 * 4 * 16 * 48, TRANSPOSED),
            Uncovered("GptOssExperts", "down_proj", 2, 2 * 4 * 24 * 16, TRANSPOSED),
            Uncovered("GptOssExperts", "gate_up_proj_bias", 2, 2 * 4 * 48, OWN),
            Uncovered("GptOssExperts", "down_proj_bias", 2, 2 * 4 * 16, OWN),
            Uncovered("GptOssTopKRouter", "weight", 2, 2 * 4 * 16, OWN),
        ],
    ),
    "plain": (
        Spoken,
        [
            Uncovered(
                "Block", "mixing", 3, 3 * 3 * 8 * 8, "no matrix, nor experts that are read as F.linear(x, self.mixing[i])"
            ),
            Uncovered("Spoken", "positions", 1, 21 * 8, OWN),
            Uncovered("Spoken", "token", 1, 8, VECTOR),
        ],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_leftovers(name: str) -> None:
    build, expected = CASES[name]
    with torch.device("meta"):
        model = build()
    anatomy = describe(model)
    found = uncovered(model, anatomy)
    assert sorted(found, key=str) == sorted(expected, key=str)
    assert [row.parameters for row in found] == sorted((row.parameters for row in found), reverse=True)
    flat = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() < 2)
    assert anatomy.other_parameters == flat + sum(row.parameters for row in found)
