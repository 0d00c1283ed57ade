import copy
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

import hpr
from conftest import HEADS, inputs_of
from hpr.evaluation.cost import coded_bytes, disk_bytes
from hpr.nn.bank import recorded_objective
from hpr.nn.coded import codes_of
from hpr.plans.rounding import Rounding
from hpr.rounding import choice, search
from hpr.rounding.plan import plan_bytes


@pytest.mark.parametrize("family", HEADS)
def test_a_saved_model_loads_with_bit_equal_outputs(
    family: str, build: Callable[..., nn.Module], ids: Tensor, tmp_path: Path
) -> None:
    model, inputs = build(family, HEADS[family]), inputs_of(family, ids)
    profile = hpr.profile(model, [inputs])
    student = hpr.share(model, hpr.plan(model, profile, "40%bytes"), profile)
    folder = hpr.save(student, tmp_path / "coded")
    loaded = HEADS[family].from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, student(**inputs).logits)
        assert not torch.equal(student(**inputs).logits, model(**inputs).logits)
    assert recorded_objective(loaded) == recorded_objective(student) == profile.about["objective"]
    again = hpr.save(loaded, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    plain = hpr.load(copy.deepcopy(model), folder)
    assert recorded_objective(plain) == profile.about["objective"]
    with torch.no_grad():
        assert torch.equal(plain(**inputs).logits, student(**inputs).logits)


@pytest.mark.parametrize("loaded", [False, True])  # transformers freezes Whisper's fixed positions, except in loaded models
def test_a_whisper_keeps_its_outputs_and_the_files_beside_its_weights(loaded: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    lengths = {"max_source_positions": 20, "max_target_positions": 12, "num_mel_bins": 8, "vocab_size": 40}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3}
    config = tf.WhisperConfig(d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, **layers, **lengths, **tokens)
    model = tf.WhisperForConditionalGeneration(config).eval()
    model.generation_config.max_length = 11
    folder = tmp_path / "whisper"
    model.save_pretrained(folder)
    tf.WhisperFeatureExtractor(feature_size=8, chunk_length=1).save_pretrained(folder)
    if loaded:
        model = tf.WhisperForConditionalGeneration.from_pretrained(folder)
    inputs = {"input_features": torch.randn(2, 8, 40), "labels": torch.randint(4, 40, (2, 6))}
    profile = hpr.profile(model, [inputs], structure=False)
    assert profile.sites["decoder.embed_positions"].has_gradient
    student = hpr.share(model, hpr.plan(model, profile, "40%bytes"), profile)
    out = hpr.save(student, tmp_path / "coded", source=folder)
    again = tf.WhisperForConditionalGeneration.from_pretrained(out)
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, student(**inputs).logits)
    assert again.generation_config.max_length == 11
    assert tf.AutoFeatureExtractor.from_pretrained(out).feature_size == 8


def test_without_hpr_loading_is_an_error_and_no_new_weights(bert: nn.Module, profile: hpr.Profile, tmp_path: Path) -> None:
    folder = hpr.save(hpr.share(bert, hpr.plan(bert, profile, "40%bytes"), profile), tmp_path / "coded")
    script = f"import transformers; transformers.AutoModel.from_pretrained({str(folder)!r})"
    alone = os.environ | {"HPR_AUTOLOAD": "0"}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=alone)
    assert run.returncode != 0
    assert "pip install hpr" in run.stderr.strip().splitlines()[-1]


def test_a_plain_save_of_a_loaded_model_is_a_stock_checkpoint(
    bert: nn.Module, profile: hpr.Profile, ids: Tensor, tmp_path: Path
) -> None:
    student = hpr.share(bert, hpr.plan(bert, profile, "40%bytes"), profile)
    loaded = tf.AutoModel.from_pretrained(hpr.save(student, tmp_path / "coded"))
    loaded.save_pretrained(tmp_path / "stock")
    assert "quantization_config" not in (tmp_path / "stock" / "config.json").read_text()
    stock = tf.AutoModel.from_pretrained(tmp_path / "stock")
    with torch.no_grad():
        assert torch.equal(stock(ids).last_hidden_state, student(ids).last_hidden_state)


@pytest.mark.parametrize("share", [20, 35, 50])
def test_the_file_is_no_larger_than_the_budget_and_as_large_as_the_plan_says(
    share: int, bert: nn.Module, profile: hpr.Profile, tmp_path: Path
) -> None:
    limit = int(share / 100 * disk_bytes(bert))
    plan = hpr.plan(bert, profile, f"{share}%bytes")
    student = hpr.share(bert, plan, profile)
    size = (hpr.save(student, tmp_path / "coded") / "model.safetensors").stat().st_size
    assert size == disk_bytes(student)
    assert size == pytest.approx(plan.diagnostics["bytes"], rel=0.005)
    assert 0.9 * limit < size <= limit * 1.005


def test_a_budget_above_what_exact_weights_take_is_not_filled(bert: nn.Module, profile: hpr.Profile) -> None:
    plan = hpr.plan(bert, profile, "80%bytes")
    student = hpr.share(bert, plan, profile)
    assert disk_bytes(student) == pytest.approx(plan.diagnostics["bytes"], rel=0.005)
    assert plan.diagnostics["bytes"] < 0.8 * disk_bytes(bert)
    assert plan.damage < 1e-9
    for name in codes_of(student).keys() - {"pooler.dense"}:  # the objective reads all others
        assert torch.allclose(student.get_submodule(name).weight, bert.get_submodule(name).weight, rtol=1e-5, atol=1e-4)


def test_dampings_that_cannot_meet_the_limit_lose_nothing(
    bert: nn.Module, profile: hpr.Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fails(search.Search):
        def near(self) -> search.Rounded:
            if self.rounder.dampings != choice.UPWARDS[0] or self.rounder.ranks:
                raise hpr.errors.BudgetError("cannot be met")
            return super().near()

    limit = int(0.3 * disk_bytes(bert))
    monkeypatch.setattr(choice, "Search", Fails)
    for measure in (None, lambda _: 1.0):
        made = plan_bytes(bert, profile, "30%bytes", limit, measure)
        assert made.bytes <= limit
        assert made.tried == ({} if measure is None else {choice.UPWARDS[0]: 1.0})


def test_more_bytes_do_less_damage(bert: nn.Module, profile: hpr.Profile) -> None:
    damages = [hpr.plan(bert, profile, f"{share}%bytes").damage for share in (35, 45, 60, 80)]
    assert damages == sorted(damages, reverse=True)
    assert damages[-1] > 0


def test_a_plan_survives_its_file(bert: nn.Module, profile: hpr.Profile, tmp_path: Path) -> None:
    plan = hpr.plan(bert, profile, "50%bytes")
    plan.save(tmp_path / "plan.json")
    loaded = hpr.Plan.load(tmp_path / "plan.json")
    assert loaded == plan
    assert " bits" in str(plan)
    first, second = (hpr.share(bert, each, profile).state_dict() for each in (plan, loaded))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_any_changed_byte_of_the_file_is_an_error(bert: nn.Module, profile: hpr.Profile, tmp_path: Path) -> None:
    student = hpr.share(bert, hpr.plan(bert, profile, "50%bytes"), profile)
    folder = hpr.save(student, tmp_path / "coded")
    weights = folder / "model.safetensors"
    intact, places = weights.read_bytes(), random.Random(0)
    for _ in range(40):
        damaged = bytearray(intact)
        damaged[places.randrange(len(intact))] ^= 1 << places.randrange(8)
        weights.write_bytes(damaged)
        with pytest.raises(hpr.HprError, match="damaged"):
            tf.AutoModel.from_pretrained(folder)
        with pytest.raises(hpr.HprError, match="damaged"):
            hpr.load(copy.deepcopy(bert), folder)


def test_a_model_that_was_trained_after_rounding_is_not_saved_with_its_old_codes(
    bert: nn.Module, profile: hpr.Profile, tmp_path: Path
) -> None:
    student = hpr.share(bert, hpr.plan(bert, profile, "50%bytes"), profile)
    with torch.no_grad():
        student.encoder.layer[0].output.dense.weight[0, 0] += 1
    with pytest.raises(hpr.HprError, match="round it again"):
        hpr.save(student, tmp_path / "coded")


def test_a_coded_model_is_not_trained_or_compressed_again(
    bert: nn.Module, profile: hpr.Profile, ids: Tensor, tmp_path: Path
) -> None:
    student = hpr.share(bert, hpr.plan(bert, profile, "50%bytes"), profile)
    again = hpr.profile(student, [{"input_ids": ids}])
    for action in (
        lambda: hpr.heal(student, bert, [{"input_ids": ids}]),
        lambda: hpr.share(student, hpr.plan(student, again, "90%"), again),
        lambda: hpr.plan(student, again, "30%bytes"),
    ):
        with pytest.raises(hpr.HprError, match="rounded and coded"):
            action()
    dense = hpr.unshare(student)
    with torch.no_grad():
        assert torch.equal(dense(ids).last_hidden_state, student(ids).last_hidden_state)
        dense.encoder.layer[0].output.dense.weight += 1
    hpr.save(dense, tmp_path / "dense")


def test_the_codes_do_not_depend_on_the_number_of_threads(bert: nn.Module, profile: hpr.Profile) -> None:
    plan = hpr.plan(bert, profile, "50%bytes")
    before = torch.get_num_threads()
    streams = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            streams.append(codes_of(hpr.share(bert, plan, profile)))
        finally:
            torch.set_num_threads(before)
    assert streams[0] == streams[1]


def test_biases_absorb_what_rounding_does_to_the_mean_output(bert: nn.Module, profile: hpr.Profile) -> None:
    profile = replace(profile, others={})  # so biases are kept in half precision, and their rounding does not count
    plan = hpr.plan(bert, profile, "35%bytes")
    student = hpr.share(bert, plan, profile)
    name = "encoder.layer.1.intermediate.dense"
    before, after, mean = bert.get_submodule(name), student.get_submodule(name), profile.sites[name].mean
    assert mean is not None
    outputs = [site.weight.double() @ mean + site.bias.double() for site in (before, after)]
    uncorrected = after.weight.double() @ mean + before.bias.double()
    assert (outputs[1] - outputs[0]).norm() < 0.05 * (uncorrected - outputs[0]).norm()


@pytest.mark.parametrize("budget", ["0.1%bytes", "1KB", "101%bytes", "5GB"])
def test_a_budget_that_cannot_be_met_is_an_error_with_its_limit(budget: str, bert: nn.Module, profile: hpr.Profile) -> None:
    with pytest.raises(hpr.errors.BudgetError, match=r"give (a larger budget|less)"):
        hpr.plan(bert, profile, budget)


def test_a_budget_near_the_original_is_met_with_the_finest_step(bert: nn.Module, profile: hpr.Profile, ids: Tensor) -> None:
    plan = hpr.plan(bert, profile, "100%bytes")
    student = hpr.share(bert, plan, profile)
    assert plan.diagnostics["bytes"] < disk_bytes(bert)
    with torch.no_grad():
        assert torch.allclose(student(ids).last_hidden_state, bert(ids).last_hidden_state, atol=0.01)


def test_a_step_that_is_too_fine_for_integers_is_an_error(bert: nn.Module, profile: hpr.Profile) -> None:
    plan = replace(hpr.plan(bert, profile, "50%bytes"), rounding=Rounding(1e-14))
    with pytest.raises(hpr.errors.PlanError, match="larger step"):
        hpr.share(bert, plan, profile)


def test_options_of_sharing_are_refused_with_bytes(bert: nn.Module, profile: hpr.Profile) -> None:
    with pytest.raises(hpr.errors.BudgetError, match="only is"):
        hpr.plan(bert, profile, "50%bytes", hpr.PlanOptions(only="encoder.*"))


def test_a_coded_plan_without_a_profile_is_an_error(bert: nn.Module, profile: hpr.Profile) -> None:
    plan = hpr.plan(bert, profile, "50%bytes")
    with pytest.raises(hpr.errors.PlanError, match="give the profile"):
        hpr.share(bert, plan)


@pytest.mark.parametrize("step", [0, -1, float("nan"), "1"])
def test_a_step_that_is_no_positive_number_is_an_error(step: float) -> None:
    with pytest.raises(hpr.errors.PlanError, match="give a number above 0"):
        Rounding(step)


@pytest.mark.parametrize(("bits", "largest"), [(8, 127), (4, 7)])
def test_codes_stay_in_the_range_that_is_asked_for_and_the_plan_records_it(
    bits: int, largest: int, bert: nn.Module, profile: hpr.Profile, tmp_path: Path
) -> None:
    with torch.no_grad():  # outliers: numbers, a row and a column
        bert.encoder.layer[0].output.dense.weight[3, 4] = 50
        bert.encoder.layer[1].output.dense.weight[5] *= 100
        bert.encoder.layer[2].output.dense.weight[:, 6] *= 100
    plan = hpr.plan(bert, profile, "60%bytes", hpr.PlanOptions(bits=bits))
    assert f"codes of {bits} bits" in str(plan)
    plan.save(tmp_path / "plan.json")
    student = hpr.share(bert, hpr.Plan.load(tmp_path / "plan.json"), profile)
    codes = [coded.codes() for coded in codes_of(student).values()]
    assert max(abs(one.values).max() for one in codes) == largest
    free = hpr.plan(bert, profile, "60%bytes")
    assert max(abs(one.codes().values).max() for one in codes_of(hpr.share(bert, free, profile)).values()) > largest
    size = (hpr.save(student, tmp_path / "coded") / "model.safetensors").stat().st_size
    assert size == pytest.approx(plan.diagnostics["bytes"], rel=0.01)
    assert plan.diagnostics["bytes"] <= 0.6 * disk_bytes(bert)


def test_a_budget_that_few_bits_cannot_fill_is_met_with_fewer_bytes(bert: nn.Module, profile: hpr.Profile) -> None:
    plan = hpr.plan(bert, profile, "100%bytes", hpr.PlanOptions(bits=4))
    assert plan.diagnostics["bytes"] < 0.8 * disk_bytes(bert)
    assert plan.damage <= 1.05 * hpr.plan(bert, profile, "60%bytes", hpr.PlanOptions(bits=4)).damage


@pytest.mark.parametrize("bits", [0, 3, 16, 4.0, "8", True])
def test_other_bits_are_an_error(bits: int) -> None:
    with pytest.raises(hpr.errors.PlanError, match="give 8"):
        hpr.PlanOptions(bits=bits)
    with pytest.raises(hpr.errors.PlanError, match="give 8"):
        Rounding(0.1, bits=bits)


def test_bits_belong_to_budgets_in_bytes(bert: nn.Module, profile: hpr.Profile, ids: Tensor) -> None:
    with pytest.raises(hpr.errors.BudgetError, match="such as 8MB"):
        hpr.plan(bert, profile, "80%", hpr.PlanOptions(bits=8))
    with pytest.raises(hpr.errors.BudgetError, match="such as 8MB"):
        hpr.compress(bert, "80%", [{"input_ids": ids}], options=hpr.PlanOptions(bits=8))


def test_a_large_model_is_searched_by_estimated_sizes_and_ends_within_the_budget(
    bert: nn.Module, profile: hpr.Profile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "_LARGE", 1)
    encoded = []
    monkeypatch.setattr(search, "coded_bytes", lambda *given: encoded.append(1) or coded_bytes(*given))
    limit = int(0.5 * disk_bytes(bert))
    made = plan_bytes(bert, profile, "50%bytes", limit, lambda student: student.embeddings.word_embeddings.weight.std().item())
    assert 0.99 * limit < made.bytes <= limit
    assert len(made.tried) > 1
    assert len(encoded) <= 4
    assert disk_bytes(made.student) == pytest.approx(made.bytes, rel=0.005)


@pytest.mark.parametrize(
    ("scores", "chosen"),
    [
        ((1.0, 0.99, 1.2, 0.8), (0.05, 0.05)),  # more damping is no worse, so less is tried, too
        ((1.0, 0.5, 0.6), (0.3, 0.3)),  # more damping is clearly better
        ((1.0, 1.2, 0.97), (0.15, 0.15)),  # less damping is not clearly better
        ((1.0, 1.2, 0.8), (0.05, 0.05)),
    ],
)
def test_dampings_are_tried_while_they_serve(
    scores: tuple[float, ...], chosen: tuple[float, float], bert: nn.Module, profile: hpr.Profile
) -> None:
    left = iter(scores)
    made = plan_bytes(bert, profile, "40%bytes", int(0.4 * disk_bytes(bert)), lambda student: next(left))
    assert made.plan.rounding is not None
    assert (made.plan.rounding.output_damping, made.plan.rounding.input_damping) == chosen
    assert tuple(made.tried.values()) == scores
