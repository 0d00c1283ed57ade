"""Which slots of two stacks are counterparts, for models of several families and for plain modules."""

import pytest
import torch
import transformers as tf
from torch import nn

from hpr.anatomy.describe import describe
from hpr.planning.rows import counterparts, rows

ATTENTION = [f"self_attn.{name}_proj" for name in ("k", "v", "q", "out")]
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def tracks_of(model, pattern=None):
    anatomy = describe(model)
    return anatomy, {row.name: row for row in rows(model, anatomy, {site.name for site in anatomy.select(pattern)})}


def test_barts_encoder_and_decoder_are_kin(build) -> None:
    anatomy, found = tracks_of(build("bart"))
    for slot in (*ATTENTION, "fc1", "fc2"):
        row = found[f"encoder · {slot} + decoder · {slot}"]
        assert [site.label for site in row.sites] == [f"{stack}.{n}.{slot}" for stack in ("encoder", "decoder") for n in (0, 1)]
        assert row.spans == ((0, 2), (2, 4))
    crossing = [name for name in found if "encoder_attn" in name]
    assert crossing == [f"decoder · {slot.replace('self', 'encoder')}" for slot in ATTENTION]
    assert sum(len(row.sites) for row in found.values()) == len(anatomy.sites)


def test_t5s_feed_forward_has_another_number_above(build) -> None:
    model = build("t5")
    found = counterparts(model, describe(model))
    assert found["encoder", "layer.1.DenseReluDense.wi"] == ("decoder", "layer.2.DenseReluDense.wi")
    assert found["encoder", "layer.0.SelfAttention.q"] == ("decoder", "layer.0.SelfAttention.q")
    assert len(found) == 6
    assert not any("EncDecAttention" in slot or "bias" in slot for pair in found.items() for _, slot in pair)


def test_whisper_and_marian_are_kin() -> None:
    sizes = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 40}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    for model in (
        tf.WhisperModel(tf.WhisperConfig(**sizes, **heads, **tokens)),
        tf.MarianModel(tf.MarianConfig(**sizes, **heads, **tokens)),
    ):
        assert sorted(counterparts(model, describe(model))) == sorted(("encoder", slot) for slot in (*ATTENTION, "fc1", "fc2"))


def test_other_widths_are_no_kin() -> None:
    config = tf.BartConfig(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_ffn_dim=32, decoder_ffn_dim=48, vocab_size=40
    )
    config.encoder_attention_heads = config.decoder_attention_heads = 2
    model = tf.BartModel(config)
    assert sorted(counterparts(model, describe(model))) == sorted(("encoder", slot) for slot in ATTENTION)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_one_stack_has_no_kin(build, family) -> None:
    model = build(family)
    assert counterparts(model, describe(model)) == {}


def test_two_towers_are_no_kin() -> None:
    config = tf.CLIPConfig(
        text_config={**SMALL, "vocab_size": 40},
        vision_config={**SMALL, "image_size": 8, "patch_size": 4},
        projection_dim=16,
    )
    model = tf.CLIPModel(config)
    anatomy = describe(model)
    assert len(anatomy.stacks) == 2
    assert counterparts(model, anatomy) == {}


class Block(nn.Module):
    def __init__(self, *names: str, width: int = 8):
        super().__init__()
        self.parts = nn.ModuleDict({name: nn.Linear(width, width) for name in names})


class Towers(nn.Module):
    """No configuration says what it is."""

    def __init__(self, below: tuple[str, ...], above: tuple[str, ...]):
        super().__init__()
        self.one = nn.ModuleDict({"blocks": nn.ModuleList(Block(*below) for _ in range(2))})
        self.two = nn.ModuleDict({"blocks": nn.ModuleList(Block(*above) for _ in range(3))})


def test_plain_modules_go_by_structure() -> None:
    reads, towers, strangers = (
        Towers(("q", "k"), ("q", "k", "cross")),
        Towers(("q", "k"), ("q", "k")),
        Towers(("q",), ("k", "c")),
    )
    assert counterparts(reads, describe(reads)) == {("one", f"parts.{name}"): ("two", f"parts.{name}") for name in "qk"}
    assert counterparts(towers, describe(towers)) == counterparts(strangers, describe(strangers)) == {}
    more_below = Towers(("q", "k", "only"), ("q", "k", "cross"))
    assert counterparts(more_below, describe(more_below)) == {}


def test_slots_alike_but_for_a_number_within_a_stack_are_no_kin() -> None:
    model = Towers(("q",), ("q", "cross"))
    for stack in (model.one, model.two):
        for block in stack["blocks"]:
            block.parts["list"] = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
    assert counterparts(model, describe(model)) == {("one", "parts.q"): ("two", "parts.q")}


def test_runs_may_cross_from_one_stack_to_the_next_but_not_leap(build) -> None:
    _, found = tracks_of(build("bart"))
    row = found["encoder · fc1 + decoder · fc1"]
    assert row.adjacent(0, 4)
    assert row.adjacent(1, 3)
    torch.manual_seed(0)
    model = tf.BertModel(tf.BertConfig(**{**SMALL, "num_hidden_layers": 4}, vocab_size=40))
    _, found = tracks_of(model, "encoder.0.*,encoder.2.*,encoder.3.*")
    row = found["encoder · attention.self.query"]
    assert [row.adjacent(*run) for run in ((0, 1), (0, 2), (1, 3), (0, 3))] == [True, False, True, False]
