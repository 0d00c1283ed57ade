"""Presets: which layers share, what a plan of them costs, and training from scratch with them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import hpr
from hpr.anatomy.describe import describe
from hpr.anatomy.lookup import module_at, weight_of
from hpr.anatomy.swappable import not_swappable
from hpr.errors import HprError, PlanError
from hpr.nn.bank import bank_of
from hpr.operators import naming
from hpr.planning import presets
from hpr.planning.presets import Preset
from hpr.plans.plan import Plan
from hpr.plans.terms import KEEP

SIZES = {"hidden_size": 16, "num_hidden_layers": 6, "num_attention_heads": 2, "intermediate_size": 32}
TEXT = SIZES | {"vocab_size": 40}
BOTH = {"encoder_layers": 4, "decoder_layers": 6, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
HEADS = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
GPT2 = {"n_embd": 16, "n_layer": 6, "n_head": 2, "vocab_size": 40, "n_positions": 24, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 4, "num_decoder_layers": 6, "num_heads": 2}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: tf.BertForMaskedLM(tf.BertConfig(**TEXT, max_position_embeddings=24)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**TEXT, num_key_value_heads=1)),
    "t5": lambda: tf.T5ForConditionalGeneration(tf.T5Config(**T5, decoder_start_token_id=0)),
    "bart": lambda: tf.BartForConditionalGeneration(
        tf.BartConfig(**BOTH, **HEADS, d_model=16, vocab_size=40, max_position_embeddings=24)
    ),
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(**SIZES, image_size=8, patch_size=4, num_labels=5)),
}
PRESETS = (
    presets.sequence(2),
    presets.cycle(2),
    presets.cycle_rev(3),
    presets.sandwich(),
    presets.albert(),
    presets.adjacent(2),
)
NAMES = ("sequence", "cycle", "cycle_rev", "sandwich", "albert", "adjacent")


def built(family: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[family]().eval()


def inputs(family: str) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    if family == "vit":
        return {"pixel_values": torch.randn(4, 3, 8, 8, generator=draw), "labels": torch.arange(4)}
    ids = torch.randint(3, 40, (4, 9), generator=draw)
    return {"input_ids": ids, "labels": ids}


def shared(plan: Plan) -> dict[str, list[str]]:
    """Factor → the sites that read it."""
    users: dict[str, list[str]] = {}
    for name, entry in plan.entries.items():
        for term in entry.terms:
            users.setdefault(term.u, []).append(name)
    return users


@st.composite
def cases(draw: st.DrawFn) -> tuple[Preset, int]:
    name = draw(st.sampled_from(NAMES))
    least = 3 if name == "sandwich" else 1
    layers = draw(st.integers(least, 60))
    return Preset(name, draw(st.integers(least, layers))), layers


@given(cases())
def test_groups_are_numbered_in_order_and_none_is_left_out(case: tuple[Preset, int]) -> None:
    preset, layers = case
    groups = preset.assign(layers)
    assert len(groups) == layers
    assert groups[0] == 0
    count = -(-layers // preset.number) if preset.name == "adjacent" else preset.number
    assert list(dict.fromkeys(groups)) == list(range(count))


@given(st.integers(1, 8), st.integers(1, 8))
def test_what_divides_divides_evenly(groups: int, size: int) -> None:
    layers = groups * size
    runs = tuple(number for number in range(groups) for _ in range(size))
    assert presets.sequence(groups).assign(layers) == presets.adjacent(size).assign(layers) == runs
    assert presets.cycle(groups).assign(layers) == tuple(range(groups)) * size
    reversed_last = tuple(range(groups)) * (size - 1) + tuple(range(groups))[:: -1 if size > 1 else 1]
    assert presets.cycle_rev(groups).assign(layers) == reversed_last


@given(cases())
def test_sizes_of_runs(case: tuple[Preset, int]) -> None:
    preset, layers = case
    groups = preset.assign(layers)
    counts = [groups.count(group) for group in set(groups)]
    if preset.name in ("sequence", "cycle"):
        assert max(counts) - min(counts) <= 1
    if preset.name == "sandwich":
        assert groups.count(groups[0]) == groups.count(groups[-1]) == 1
    if preset.name in ("sequence", "sandwich", "albert", "adjacent"):
        assert list(groups) == sorted(groups)


@pytest.mark.parametrize(
    ("preset", "layers", "groups"),
    [
        (presets.sequence(3), 6, "001122"),
        (presets.cycle(3), 6, "012012"),
        (presets.cycle_rev(3), 6, "012210"),
        (presets.sequence(3), 7, "0001122"),
        (presets.cycle(3), 7, "0120120"),
        (presets.cycle_rev(3), 7, "0120122"),
        (presets.cycle_rev(3), 9, "012012210"),
        (presets.cycle_rev(3), 3, "012"),
        (presets.sandwich(), 6, "011112"),
        (presets.sandwich(4), 6, "011223"),
        (presets.sandwich(), 3, "012"),
        (presets.albert(), 6, "000000"),
        (presets.adjacent(2), 6, "001122"),
        (presets.adjacent(2), 7, "0011223"),
    ],
)
def test_assignments_of_the_papers(preset: Preset, layers: int, groups: str) -> None:
    assert preset.assign(layers) == tuple(map(int, groups))


@pytest.mark.parametrize("number", [0, -1, 2.0, True, "2", None])
def test_what_is_no_number_of_groups_is_refused(number: object) -> None:
    with pytest.raises(PlanError, match="is not a whole number from 1 up"):
        presets.cycle(number)  # type: ignore[arg-type]


def test_other_wrong_arguments_are_refused() -> None:
    with pytest.raises(PlanError, match="from 3 up"):
        presets.sandwich(2)
    with pytest.raises(PlanError, match="no preset 'spiral'; there are sequence"):
        Preset("spiral", 2)
    with pytest.raises(PlanError, match=r"cycle\(groups=7\) needs 7 layers or more, the stack has 6: give 6 or less"):
        presets.cycle(7).assign(6)
    with pytest.raises(PlanError, match="0 is not a number of layers"):
        presets.albert().assign(0)


def test_models_that_a_preset_does_not_fit_are_refused() -> None:
    with pytest.raises(PlanError, match=r"encoder: cycle\(groups=5\) needs 5 layers or more, the stack has 4: .*only="):
        presets.cycle(5).plan(built("t5"))
    with pytest.raises(PlanError, match="has none: build the model"):
        presets.albert().plan(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))
    with pytest.raises(PlanError, match="has encoder with 1: build the model"):
        presets.albert().plan(tf.BertModel(tf.BertConfig(**TEXT | {"num_hidden_layers": 1})))
    with pytest.raises(PlanError, match="embeddings or outside the stacks"):
        presets.albert(only="*word_embeddings*").plan(built("bert"))
    with pytest.raises(HprError, match="matches no site"):
        presets.albert(only="nowhere.*").plan(built("bert"))
    torch_layers = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2, enable_nested_tensor=False)
    with pytest.raises(PlanError, match="reads its weight past the module"):
        presets.albert(only="*out_proj").plan(nn.ModuleDict({"body": torch_layers}))
    bert = built("bert")
    with pytest.raises(HprError, match="takes no profile"):
        hpr.share(bert, presets.albert(), object())  # type: ignore[arg-type]
    with pytest.raises(HprError, match="shared already"):
        hpr.share(hpr.share(bert, presets.albert()), presets.albert())


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("preset", PRESETS, ids=str)
def test_plan_ties_groups_and_keeps_the_rest(family: str, preset: Preset) -> None:
    model = built(family)
    anatomy, plan, kept = describe(model), preset.plan(model), not_swappable(model, describe(model))
    layers = {stack.name: stack.layers for stack in anatomy.stacks}
    expected = anatomy.total_parameters
    for sites in anatomy.slots().values():
        tied = [site for site in sites if site.stack and site.kind == "linear" and site.name not in kept]
        groups = {preset.assign(layers[site.stack])[site.layer] for site in tied}  # type: ignore[index]
        expected -= (len(tied) - len(groups)) * sites[0].parameters
    assert plan.budget.parameters == plan.parameters(anatomy) == expected < anatomy.total_parameters
    for factor, users in shared(plan).items():
        assert len(users) > 1
        assert len({(anatomy[name].stack, anatomy[name].slot) for name in users}) == 1, factor
    assert all(plan.entries[site.name].operator == KEEP for site in anatomy.sites if site.kind == "embedding" or not site.stack)
    assert Plan.from_dict(plan.to_dict()) == plan
    student = hpr.share(model, preset)
    assert sum(parameter.numel() for parameter in student.parameters()) == expected


@pytest.mark.parametrize("family", MODELS)
def test_factors_are_the_weights_of_the_first_layers(family: str) -> None:
    model, preset = built(family), presets.cycle_rev(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    anatomy, student = describe(model), hpr.share(model, preset)
    bank = bank_of(student)
    assert bank is not None
    for factor, users in shared(preset.plan(model)).items():
        first = min((anatomy[name] for name in users), key=lambda site: site.layer)  # type: ignore[arg-type,return-value]
        weight = weight_of(module_at(model, first.name))
        assert bank[factor].weight.std() == weight.std()
        assert torch.equal(bank[factor].weight, weight)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    private = [name for name, value in model.named_parameters() if value.dim() == 1]
    assert {name for name, value in student.named_parameters() if value.dim() == 1} == set(private)


@pytest.mark.parametrize("family", MODELS)
def test_saved_and_loaded_is_bit_equal(family: str, tmp_path: Path) -> None:
    student = hpr.share(built(family), presets.cycle_rev(3))
    student.save_pretrained(tmp_path)
    again = type(student).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        one, other = student(**inputs(family)), again(**inputs(family))
    assert torch.equal(one.logits, other.logits)
    assert sum(value.numel() for value in again.parameters()) == sum(value.numel() for value in student.parameters())


@pytest.mark.parametrize("family", MODELS)
def test_gradients_are_summed_over_members(family: str) -> None:
    model, preset = built(family), presets.cycle(2)
    plan, anatomy = preset.plan(model), describe(model)
    student = hpr.share(model, preset)
    dense = hpr.unshare(student)
    for each in (student, dense):
        each(**inputs(family)).loss.backward()
    bank = bank_of(student)
    assert bank is not None
    for factor, users in shared(plan).items():
        modules = [module_at(dense, anatomy[name].name) for name in users]
        gradients = [one.weight.grad.T if isinstance(one, Conv1D) else one.weight.grad for one in modules]
        torch.testing.assert_close(bank[factor].weight.grad, sum(gradients), rtol=1e-5, atol=1e-5)


def test_training_keeps_members_on_one_factor() -> None:
    student = hpr.share(built("gpt2"), presets.cycle(3)).train()
    first, fourth = (student.transformer.h[layer].attn.c_attn for layer in (0, 3))
    start = first.dense_weight().detach().clone()
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = student(**inputs("gpt2")).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert first.bank[first.terms[0].u] is fourth.bank[fourth.terms[0].u]
    assert torch.equal(first.dense_weight(), fourth.dense_weight())
    assert not torch.equal(first.dense_weight(), start)
    assert not torch.equal(first.bias, fourth.bias)


def test_names_of_groups() -> None:
    bert = built("bert")
    names = {
        preset: {factor for factor in shared(preset.plan(bert)) if factor.endswith("attention.self.query")}
        for preset in PRESETS[1:5]
    }
    slot = "attention.self.query"
    assert names[PRESETS[1]] == {f"encoder.0+2+4.{slot}", f"encoder.1+3+5.{slot}"}
    assert names[PRESETS[2]] == {f"encoder.0+5.{slot}", f"encoder.1+4.{slot}", f"encoder.2-3.{slot}"}
    assert names[PRESETS[3]] == {f"encoder.1-4.{slot}"}
    assert names[PRESETS[4]] == {f"encoder.0-5.{slot}"}
    sites = describe(bert).slots()["encoder", slot]
    assert naming.group_name([sites[index] for index in (0, 1, 4)]) == f"encoder.0-1+4.{slot}"
    assert naming.group_name([sites[3]]) == f"encoder.3-3.{slot}"
    other = describe(bert).slots()["encoder", "attention.self.key"]
    assert naming.group_name([sites[0], sites[1], other[4]]) == f"encoder.0-1.{slot}+encoder.4-4.attention.self.key"


def test_only_leaves_out_a_stack_and_slots() -> None:
    plan = presets.cycle(5, only="decoder.*.EncDecAttention.*, decoder.*.DenseReluDense.w?").plan(built("t5"))
    tied = {name for name, entry in plan.entries.items() if entry.terms}
    assert tied
    assert all(name.startswith("decoder.") and "SelfAttention" not in name for name in tied)


def test_shapes_have_groups_of_their_own() -> None:
    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, width), nn.Linear(4, 4)

    model = nn.ModuleDict({"layers": nn.ModuleList(Block(width) for width in (8, 8, 6, 6, 6, 3))})
    plan = presets.albert().plan(model)
    assert {factor.rpartition(".")[0]: len(users) for factor, users in shared(plan).items() if factor.endswith("up")} == {
        "layers.0-1": 2,
        "layers.2-4": 3,
    }
    assert plan.entries["layers.5.up"].operator == KEEP
    bank = bank_of(hpr.share(model, presets.albert()))
    assert bank is not None
    assert torch.equal(bank["layers.2-4.up"].weight, model["layers"][2].up.weight)


def test_half_precision_and_as_many_groups_as_layers() -> None:
    model = built("llama").bfloat16()
    student = hpr.share(model, presets.sequence(3))
    assert {parameter.dtype for parameter in student.parameters()} == {torch.bfloat16}
    assert bank_of(hpr.share(model, presets.cycle(6))) is None


def test_the_plan_of_a_preset_is_fitted_like_any_other() -> None:
    """Without a profile the matrix of least damage is the mean, whose spread is that of the members by √N."""
    model, preset = built("bert"), presets.cycle(2)
    name = "encoder.0+2+4.attention.self.query"
    weights = [model.bert.encoder.layer[layer].attention.self.query.weight for layer in (0, 2, 4)]
    fitted, first = (bank_of(hpr.share(model, each)) for each in (preset.plan(model), preset))
    assert fitted is not None
    assert first is not None
    torch.testing.assert_close(fitted[name].weight, sum(weights) / 3)
    assert torch.equal(first[name].weight, weights[0])
    assert 0.8 < fitted[name].weight.std() * 3**0.5 / first[name].weight.std() < 1.2


@pytest.mark.parametrize(("groups", "expected"), [(1, "0000"), (2, "0101"), (3, "0120")])
def test_an_encoder_and_its_decoder_as_one_sequence(groups: int, expected: str) -> None:
    """Encoder layers first; what only the decoder has is shared between its own layers alone."""
    config = tf.MarianConfig(
        vocab_size=40, d_model=16, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
        encoder_attention_heads=2, decoder_attention_heads=2, pad_token_id=0, decoder_start_token_id=0, eos_token_id=1,
    )  # fmt: skip
    model = tf.MarianMTModel(config).eval()
    plan = presets.cycle(groups, spanning=True).plan(model)
    names = [f"{stack}.layers.{layer}.self_attn.q_proj" for stack in ("encoder", "decoder") for layer in (0, 1)]
    factors = [plan.entries[name].terms[0].u if plan.entries[name].terms else name for name in names]
    order = list(dict.fromkeys(factors))
    assert "".join(str(order.index(factor)) for factor in factors) == expected
    crossed = [plan.entries[f"decoder.layers.{layer}.encoder_attn.k_proj"].terms for layer in (0, 1)]
    assert (crossed[0] == crossed[1] != ()) == (groups == 1)
    student = hpr.share(model, presets.cycle(groups, spanning=True))
    inputs = {"input_ids": torch.tensor([[5, 6, 1]]), "decoder_input_ids": torch.tensor([[0, 7]])}
    student(**inputs).logits.sum().backward()
    assert all(parameter.grad is not None for name, parameter in student.named_parameters() if "hpr_bank" in name)


def test_one_stack_has_nothing_to_span() -> None:
    model = tf.BertModel(tf.BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16))
    with pytest.raises(PlanError, match=r"cycle\(groups=2, spanning=True\) needs an encoder and a decoder"):
        presets.cycle(2, spanning=True).plan(model)
