"""Aligned models compute the same, their profile is transformed too, and a plan that aligns needs its file alone."""

import copy
import json

import numpy as np
import pytest
import torch
import transformers as tf

import hpr
from hpr.anatomy.describe import describe
from hpr.anatomy.lookup import module_at
from hpr.anatomy.symmetry import AlignTarget, AxisSlice, Symmetry, layers_of, transform_site
from hpr.errors import HprError
from hpr.operators.alignment import align, align_options, symmetry_groups
from hpr.operators.metric import measure
from hpr.operators.registry import OPERATORS
from hpr.planning import planner
from hpr.planning.options import PlanOptions
from hpr.plans.plan import Plan
from hpr.profiling.profile import Profile
from hpr.runtime.hooks import run

SIZES = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32}
TEXT = {"vocab_size": 40, "max_position_embeddings": 24, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BOTH = {f"{side}_{name}": count for side in ("encoder", "decoder") for name, count in (("layers", 2), ("attention_heads", 2))}
MODELS = {
    "bert": lambda: tf.BertModel(tf.BertConfig(**SIZES, **TEXT)),
    "llama": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, **TEXT, num_key_value_heads=2)),
    "gpt2": lambda: tf.GPT2Model(tf.GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=40, n_positions=24)),
    "bart": lambda: tf.BartForConditionalGeneration(
        tf.BartConfig(**BOTH, **TEXT, d_model=16, encoder_ffn_dim=32, decoder_ffn_dim=32, decoder_start_token_id=2)
    ),
    "vit": lambda: tf.ViTModel(tf.ViTConfig(**SIZES, image_size=16, patch_size=4)),
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2, pad_token_id=0, decoder_start_token_id=0
        )
    ),
}


def made(family: str) -> torch.nn.Module:
    """A tiny model in float64 whose biases and norms are not all alike."""
    torch.manual_seed(0)
    model = MODELS[family]().eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


def data(family: str) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    if family == "vit":
        return {"pixel_values": torch.randn(6, 3, 16, 16, generator=draw, dtype=torch.float64)}
    ids = torch.randint(3, 40, (6, 12), generator=draw)
    return {"input_ids": ids, "labels": ids.roll(1, 0)} if family in ("bart", "t5") else {"input_ids": ids}


def outputs(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found = run(model, batch)
    return found.logits if "logits" in found else found[0]


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    model, batch = made(request.param), data(request.param)
    return model, batch, hpr.profile(model, [batch])


def all_options(profile: Profile) -> list[tuple[AlignTarget, ...]]:
    return [targets for group in symmetry_groups(profile.symmetries) for targets in align_options(group)]


def test_outputs_stay_the_same_in_float64(case) -> None:
    model, batch, profile = case
    before = outputs(model, batch)
    assert all_options(profile)
    for targets in all_options(profile):
        aligned = align(model, profile, targets)
        assert aligned.transforms
        assert (outputs(aligned.model, batch) - before).abs().max() < 1e-10
        weights = zip(model.parameters(), aligned.model.parameters(), strict=True)
        assert any((one - other).abs().max() > 1e-3 for one, other in weights)


def test_outputs_stay_the_same_in_float32(case) -> None:
    model, batch, profile = case
    model = copy.deepcopy(model).float()
    batch = {key: value.float() if value.is_floating_point() else value for key, value in batch.items()}
    profile = hpr.profile(model, [batch])
    targets = [target for group in symmetry_groups(profile.symmetries) for target in align_options(group)[0]]
    before, after = outputs(model, batch), outputs(align(model, profile, targets).model, batch)
    assert (after - before).abs().max() < 1e-5 * before.abs().max().clamp(min=1)


def test_the_profile_turns_as_if_measured_anew(case) -> None:
    model, batch, profile = case
    for targets in all_options(profile):
        aligned = align(model, profile, targets)
        anew = hpr.profile(aligned.model, [batch])
        assert anew.fingerprint == aligned.profile.fingerprint
        compared = 0
        for name, known in aligned.profile.sites.items():
            found = anew.sites[name]
            assert known.rows == found.rows
            compared += 1
            for part in ("left", "right", "mean"):
                one, other = getattr(known, part), getattr(found, part)
                if other is not None:  # sums are collected in float32
                    torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * float(other.abs().max()))
        assert compared > len(anew.sites) / 2


def test_what_a_site_becomes_alone_costs_the_same(case) -> None:
    model, _, profile = case
    anatomy = describe(model)
    before = measure(model, anatomy, profile)
    for targets in all_options(profile):
        aligned = align(model, profile, targets)
        after = measure(aligned.model, anatomy, aligned.profile)
        for name in {
            site.name for target in targets for slots in layers_of(anatomy, target.symmetry).values() for site in slots.values()
        }:
            for operator in ("keep", "low rank"):
                one, other = (OPERATORS[operator].candidate([each[name]]) for each in (before, after))
                assert np.allclose(one.damages, other.damages, rtol=0, atol=1e-9 * before[name].damage(before[name].weight))


@pytest.fixture(scope="module")
def planted():
    """A BERT whose layers are transformed copies of the lowest: other orders of neurons and heads, other axes within heads."""
    torch.manual_seed(0)
    sizes = SIZES | {"hidden_size": 32, "intermediate_size": 64}
    model = tf.BertModel(tf.BertConfig(**sizes, **TEXT | {"vocab_size": 200}, initializer_range=0.2)).eval()
    batches = [{"input_ids": torch.randint(3, 200, (8, 12), generator=torch.Generator().manual_seed(n))} for n in range(3)]
    found = hpr.profile(model, batches, "embedding").symmetries
    layers = model.encoder.layer
    for layer in (1, 2):
        layers[layer].load_state_dict(layers[0].state_dict())
        for symmetry in found:
            transform = torch.randperm(symmetry.blocks)
            if symmetry.kind == "rotation":
                transform = torch.linalg.qr(torch.randn(symmetry.blocks, symmetry.size, symmetry.size).double())[0]
            for axis_slice in symmetry.slices:
                transform_site(model, layers_of(describe(model), symmetry)[layer][axis_slice.slot], axis_slice, transform)
    return model, batches, hpr.profile(model, batches, "embedding")


def test_planted_copies_are_found_and_tied(planted) -> None:
    model, _, profile = planted
    tied = ["tie"]
    budget = "50%"
    plain = hpr.plan(model, profile, budget, PlanOptions(only="encoder.*", operators=tied, align=False))
    aligned = hpr.plan(model, profile, budget, PlanOptions(only="encoder.*", operators=tied))
    assert not plain.alignment
    assert {target.align_to for target in aligned.alignment} == {"layer below"}
    assert aligned.damage < 1e-3 * plain.damage
    student = hpr.share(model, aligned, profile)
    batch = {"input_ids": torch.randint(3, 200, (4, 12))}
    with torch.no_grad():
        change = student(**batch)[0] - model(**batch)[0]
    assert change.abs().max() < 1e-3


def test_the_planner_takes_alignment_by_itself(planted) -> None:
    model, _, profile = planted
    draft = planner.draft(model, profile, PlanOptions(only="encoder.*"))
    budget = draft.budget("40%")
    best = draft.best(budget)
    assert best.alignment
    assert best.damage < draft.plain.best(budget).damage
    assert draft.alternatives(budget, 3)[0].damage == best.damage
    assert not draft.alternatives(budget, 3)[-1].alignment
    assert draft.narrowed("encoder.*").best(budget).to_dict() == best.to_dict()


def test_files_alone_make_the_same_student(planted, tmp_path) -> None:
    model, _, profile = planted
    plan = hpr.plan(model, profile, "40%", PlanOptions(only="encoder.*"))
    plan.save(tmp_path / "plan.json")
    profile.save(tmp_path / "profile.safetensors")
    loaded, known = Plan.load(tmp_path / "plan.json"), Profile.load(tmp_path / "profile.safetensors")
    assert loaded.alignment == plan.alignment != ()
    assert known.symmetries == profile.symmetries
    one, other = (hpr.share(model, *pair).state_dict() for pair in ((plan, profile), (loaded, known)))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_saved_student_loads_bit_equal_and_unshares(planted, tmp_path) -> None:
    model, batches, profile = planted
    student = hpr.share(model, hpr.plan(model, profile, "40%", PlanOptions(only="encoder.*")), profile)
    student.save_pretrained(tmp_path)
    again = tf.AutoModel.from_pretrained(tmp_path).eval()
    dense = hpr.unshare(student)
    assert type(dense.encoder.layer[0].attention.self.query) is torch.nn.Linear
    with torch.no_grad():
        expected = student(**batches[0])[0]
        assert torch.equal(again(**batches[0])[0], expected)
        torch.testing.assert_close(dense(**batches[0])[0], expected, rtol=1e-4, atol=1e-5)


def test_refit_regresses_on_the_turned_model(planted) -> None:
    model, batches, profile = planted
    plan = hpr.plan(model, profile, "40%", PlanOptions(only="encoder.*"))
    student = hpr.share(model, plan, profile)
    hpr.refit(student, model, batches, plan, profile)  # against the model as it was, queries would follow other axes than keys
    with torch.no_grad():
        expected = model(**batches[0])[0]
        assert (student(**batches[0])[0] - expected).norm() < 1e-3 * expected.norm()


def test_plans_without_alignment_say_nothing_of_it(planted) -> None:
    model, _, profile = planted
    plan = hpr.plan(model, profile, "40%", PlanOptions(only="encoder.*", align=False))
    assert "alignment" not in plan.to_dict()
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))).alignment == ()
    private = hpr.plan(
        model, profile, "40%", PlanOptions(only="encoder.*", operators=["low rank"])
    )  # where nothing is shared, nothing is transformed
    assert private.alignment == ()


def test_alignment_needs_its_profile_and_its_model(planted) -> None:
    model, _, profile = planted
    plan = hpr.plan(model, profile, "40%", PlanOptions(only="encoder.*"))
    with pytest.raises(HprError, match="profile it was made with"):
        hpr.share(model, plan)
    wrong = AlignTarget(Symmetry("encoder", "order", 8, (AxisSlice("output.dense", "columns", 0, 640),)), "layer below")
    with pytest.raises(HprError, match=r"transforms columns 0 to 640 of 'output.dense'"):
        hpr.share(model, Plan.from_dict(plan.to_dict() | {"alignment": [wrong.to_list()]}), profile)
    for broken in (
        ["sideways", *wrong.to_list()[1:]],
        ["layer below", "encoder", "order"],
        ["layer below", "encoder", "order", 0, []],
    ):
        with pytest.raises(HprError, match="not a plan"):
            Plan.from_dict(plan.to_dict() | {"alignment": [broken]})


def test_the_original_is_untouched(planted) -> None:
    model, _, profile = planted
    before = copy.deepcopy(model.state_dict())
    hpr.share(model, hpr.plan(model, profile, "40%", PlanOptions(only="encoder.*")), profile)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert module_at(model, "encoder.layer.0.attention.self.query").weight.requires_grad
