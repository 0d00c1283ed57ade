"""Stacks, slots and sites of tiny models of five families and of plain modules."""

from collections.abc import Callable

import pytest
import torch
import transformers as tf
from torch import nn

from hpr.anatomy import describe as describing
from hpr.anatomy.describe import describe
from hpr.anatomy.lookup import base_of, module_at, weight_of
from hpr.errors import HprError

Build = Callable[..., nn.Module]

BERT = {"attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"}
LLAMA = {f"self_attn.{part}_proj" for part in "qkvo"} | {f"mlp.{part}_proj" for part in ("gate", "up", "down")}
BART = {f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")} | {"fc1", "fc2"}
FAMILIES = {
    "bert": (
        tf.AutoModelForMaskedLM,
        {"encoder": (3, BERT | {"intermediate.dense", "output.dense"})},
        {"embeddings.word_embeddings": ("cls.predictions.decoder",)},
    ),
    "gpt2": (
        tf.AutoModelForCausalLM,
        {"h": (3, {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"})},
        {"wte": ("lm_head",)},
    ),
    "llama": (tf.AutoModelForCausalLM, {"layers": (3, LLAMA)}, {"embed_tokens": ("lm_head",)}),
    "bart": (
        tf.AutoModelForSeq2SeqLM,
        {"encoder": (2, BART), "decoder": (2, BART | {f"encoder_attn.{part}_proj" for part in ("q", "k", "v", "out")})},
        {"shared": ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")},
    ),
    "t5": (
        tf.AutoModelForSeq2SeqLM,
        {
            "encoder": (
                2,
                {f"layer.0.SelfAttention.{part}" for part in "qkvo"} | {f"layer.1.DenseReluDense.{w}" for w in ("wi", "wo")},
            ),
            "decoder": (
                2,
                {f"layer.0.SelfAttention.{part}" for part in "qkvo"}
                | {f"layer.1.EncDecAttention.{part}" for part in "qkvo"}
                | {f"layer.2.DenseReluDense.{w}" for w in ("wi", "wo")},
            ),
        },
        {"shared": ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head")},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families(build: Build, family: str) -> None:
    head, stacks, ties = FAMILIES[family]
    model = build(family, head)
    anatomy = describe(model)
    assert {stack.name: stack.layers for stack in anatomy.stacks} == {name: layers for name, (layers, _) in stacks.items()}
    for name, (layers, slots) in stacks.items():
        for slot in slots:
            assert [site.layer for site in anatomy.slots()[name, slot]] == list(range(layers))
    assert {site.name: site.aliases for site in anatomy.sites if site.aliases} == ties
    for key in ("name", "label"):
        names = [getattr(site, key) for site in anatomy.sites]
        assert len(names) == len(set(names))
    for site in anatomy.sites:
        module = module_at(model, site.name)
        assert weight_of(module).shape == (site.out_features, site.in_features)
        assert (getattr(module, "bias", None) is not None) == site.has_bias
        assert anatomy[site.name] is site
    assert anatomy.total_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert anatomy.other_parameters == sum(p.numel() for p in model.parameters() if p.dim() != 2)


def test_conv1d_is_seen_as_out_by_in(build: Build) -> None:
    site = describe(build("gpt2"))["h.0.attn.c_attn"]
    assert (site.out_features, site.in_features, site.kind, site.has_bias) == (48, 16, "linear", True)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "bart"])
def test_names_below_a_head_are_those_of_the_base(build: Build, family: str) -> None:
    """T5 is left out: its head class has no base model of its own."""
    head = FAMILIES[family][0]
    headed = build(family, head)
    base, prefix = base_of(headed)
    assert base is not headed
    assert prefix == f"{headed.base_model_prefix}."
    inside = {site.name for site in describe(base).sites}
    assert inside <= {site.name for site in describe(headed).sites}


def test_task_heads_hang_outside_the_base(build: Build) -> None:
    model = build("bert", tf.AutoModelForSequenceClassification)
    site = describe(model)["classifier"]
    assert (site.name, site.stack, site.layer) == ("classifier", None, None)
    assert module_at(model, "classifier") is model.classifier


def test_the_meta_device_gives_the_same_anatomy(build: Build) -> None:
    model = build("bert")
    with torch.device("meta"):
        bare = tf.AutoModel.from_config(model.config)
    assert describe(bare).sites == describe(model).sites
    assert describe(bare).total_parameters == describe(model).total_parameters


def test_the_fingerprint_follows_the_weights(build: Build) -> None:
    model = build("bert")
    before = describe(model).fingerprint
    assert describe(build("bert")).fingerprint == before
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[0, 0] += 1
    assert describe(model).fingerprint != before
    anatomy = describe(model)
    found = anatomy.fingerprint
    with torch.no_grad():
        model.encoder.layer[1].output.dense.weight[0, 0] += 1
    assert anatomy.fingerprint == found != describe(model).fingerprint


def test_weights_are_read_for_the_fingerprint_alone(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    hashed = describing._fingerprint
    monkeypatch.setattr(describing, "_fingerprint", lambda *given: read.append(1) or hashed(*given))
    anatomy = describe(build("bert"))
    assert not read
    assert anatomy.fingerprint == anatomy.fingerprint
    assert len(read) == 1


class Block(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(size, 2 * size), nn.Linear(2 * size, size), nn.LayerNorm(size)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 4)
        self.blocks = nn.ModuleList(Block(4) for _ in range(3))
        self.head = nn.Linear(4, 11)
        self.head.weight = self.table.weight


def test_a_plain_module() -> None:
    anatomy = describe(Toy())
    assert [(stack.name, stack.path, stack.layers) for stack in anatomy.stacks] == [("blocks", "blocks", 3)]
    assert anatomy["blocks.2.up"].slot == "up"
    assert anatomy["table"].aliases == ("head",)
    assert anatomy.total_parameters == 44 + 11 + 3 * (2 * 32 + 8 + 4 + 8)


def test_select() -> None:
    anatomy = describe(Toy())
    assert anatomy.select(None) == anatomy.sites
    assert [site.name for site in anatomy.select("*.up")] == ["blocks.0.up", "blocks.1.up", "blocks.2.up"]
    assert {site.name for site in anatomy.select("table, blocks.1.*")} == {"table", "blocks.1.up", "blocks.1.down"}
    with pytest.raises(HprError, match="matches no site of Toy"):
        anatomy.select("encoder.*")


def test_a_pattern_without_sites_is_answered_with_a_site_of_a_stack(build: Build) -> None:
    key, label = r"encoder\.layer\.0\.attention\.self\.query", r"encoder\.0\.attention\.self\.query"
    with pytest.raises(HprError, match=rf"like {label}, or for a site key \(the path below the base model\), like {key}"):
        describe(build("bert")).select("decoder.*")


def test_a_site_is_chosen_by_its_path_or_by_its_label(build: Build) -> None:
    anatomy = describe(build("bert"))
    by_label, by_path = anatomy.select("encoder.2.*"), anatomy.select("encoder.layer.2.*")
    assert by_label == by_path
    assert {site.name: site.label for site in by_path}["encoder.layer.2.output.dense"] == "encoder.2.output.dense"
    assert anatomy["embeddings.word_embeddings"].label == "embeddings.word_embeddings"


def test_errors_name_what_is_missing() -> None:
    with pytest.raises(HprError, match="nothing to share"):
        describe(nn.LayerNorm(4))
    with pytest.raises(HprError, match="no site named 'nowhere'"):
        describe(Toy())["nowhere"]
    with pytest.raises(HprError, match="Toy has no module 'nowhere'"):
        module_at(Toy(), "nowhere")


def test_a_matrix_without_numbers_is_no_site() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 0), nn.Linear(0, 2))
    assert [site.name for site in describe(model).sites] == ["0"]
