"""Healing: the loss against references, schedules that depend on the step alone, the validation set, resuming."""

import copy
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import hpr
from hpr.anatomy.describe import describe
from hpr.errors import CheckpointError, HprError
from hpr.healing.augmentation import augmentation, vary
from hpr.healing.duration import parse_duration, steps_within
from hpr.healing.loss import GlobalLoss, Weights, labelled, related, squared
from hpr.healing.optimizer import parameter_groups
from hpr.healing.recipe import Recipe
from hpr.healing.resume import FACTS, check_place
from hpr.healing.schedule import Schedule
from hpr.healing.teacher_cache import TeacherTargets
from hpr.healing.train import train
from hpr.healing.trainer import last_checkpoint
from hpr.nn.bank import module_name, terms_in
from hpr.planning.options import PlanOptions
from hpr.profiling.objectives import OBJECTIVES
from hpr.runtime.batch import POSITIONAL, as_batch
from hpr.runtime.progress import reporting_to

SIZES = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
CONFIG = tf.BertConfig(**SIZES, vocab_size=60, max_position_embeddings=24)


def batches(count: int = 8, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(3, 60, (8, 12), generator=draw)} for _ in range(count)]


def teacher_of(kind: type = tf.BertModel) -> nn.Module:
    torch.manual_seed(0)
    model = kind(CONFIG).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def pair() -> tuple[nn.Module, nn.Module]:
    """A teacher and its student at half the parameters."""
    teacher = teacher_of()
    profile = hpr.profile(teacher, batches())
    return teacher, hpr.share(teacher, hpr.plan(teacher, profile, "50%"), profile)


def copy_of(student: nn.Module) -> nn.Module:
    return copy.deepcopy(student)


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def loss_of(teacher: nn.Module, objective: str, weights: Weights) -> GlobalLoss:
    return GlobalLoss(teacher, describe(teacher), OBJECTIVES[objective], weights)


# The loss


def test_a_copy_of_the_teacher_has_no_loss(pair) -> None:
    teacher, _ = pair
    loss = loss_of(teacher, "hidden", Weights(hidden=0.5))(copy_of(teacher), batches()[0])
    assert loss.total == 0
    assert loss.floats() == {"outputs": 0, "hidden": 0}


def test_parts_against_references_in_float64(pair) -> None:
    teacher, student = pair
    batch = {**batches()[0], "attention_mask": torch.tensor([[1] * 9 + [0] * 3] * 8)}
    loss = loss_of(teacher, "hidden", Weights(outputs=2, hidden=0.5))(student, batch)
    parts = loss.floats()
    with torch.no_grad():
        one, other = (model(**batch, output_hidden_states=True).hidden_states[1:] for model in (teacher, student))
    kept = batch["attention_mask"].bool()
    shares = [
        float((a.double() - b.double())[kept].square().sum() / a.double()[kept].square().sum())
        for a, b in zip(one, other, strict=True)
    ]
    assert parts["outputs"] == pytest.approx(2 * shares[-1], rel=1e-5)
    assert parts["hidden"] == pytest.approx(0.5 * sum(shares) / len(shares), rel=1e-5)
    assert float(loss.total.detach()) == pytest.approx(parts["outputs"] + parts["hidden"], rel=1e-6)


def test_relations_are_those_between_different_examples() -> None:
    draw = torch.Generator().manual_seed(0)
    expected, found = (torch.randn(5, 7, generator=draw, dtype=torch.float64) for _ in range(2))
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    error = sum(float(expected[i] @ expected[j] - found[i] @ found[j]) ** 2 for i, j in pairs)
    size = sum(float(expected[i] @ expected[j]) ** 2 for i, j in pairs)
    assert float(related(expected, found)) == pytest.approx(error / size, rel=1e-5)
    turned, _ = torch.linalg.qr(torch.randn(7, 7, generator=draw, dtype=torch.float64))
    assert float(related(expected, expected @ turned)) < 1e-9  # blind to a rotation of the whole space


def test_categorical_outputs_are_compared_at_a_temperature() -> None:
    draw = torch.Generator().manual_seed(0)
    expected, found = (torch.randn(5, 7, generator=draw, dtype=torch.float64) for _ in range(2))
    loss = loss_of(nn.Sequential(nn.Linear(2, 2)), "classification", Weights(temperature=3))
    reference = sum(
        9 * float(F.kl_div((q / 3).log_softmax(-1), (p / 3).softmax(-1), reduction="sum"))
        for p, q in zip(expected, found, strict=True)
    )
    assert float(loss.outputs(TeacherTargets(expected, torch.ones(5)), found, None)) == pytest.approx(reference / 5, rel=1e-6)


def test_labels() -> None:
    logits, labels = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 1])
    assert labelled(SimpleNamespace(loss=torch.tensor(3.0)), None) == 3
    assert labelled(SimpleNamespace(logits=logits), {"labels": labels}) == F.cross_entropy(logits, labels)
    with pytest.raises(HprError, match="has none: set their weight to 0"):
        labelled(SimpleNamespace(logits=logits), {"input_ids": labels})


def test_nothing_left_counts_as_one() -> None:
    values = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert squared(values, torch.zeros(3, 4), torch.ones(3)) == 1


@pytest.mark.parametrize("wrong", [{"outputs": 0}, {"hidden": -1}, {"temperature": 0}, {"outputs": float("nan")}])
def test_wrong_weights(wrong: dict[str, float]) -> None:
    with pytest.raises(HprError, match="must not be negative"):
        Weights(**wrong)


def test_dropped_layers_have_no_hidden_states_to_match(pair) -> None:
    from hpr.layer_reuse.install import with_states
    from hpr.plans.layer_states import DROPPED

    teacher, _ = pair
    student = with_states(teacher, {"encoder.2": DROPPED})
    assert loss_of(teacher, "hidden", Weights(hidden=1))(student, batches()[0]).parts["hidden"] > 0


# What is trained how


def test_each_parameter_is_in_one_group_at_a_rate_of_its_scale() -> None:
    teacher = teacher_of()
    student = hpr.share(teacher, hpr.presets.cycle(groups=2))
    found = parameter_groups(student, 1e-3, 0.25, 0.01)
    listed = [id(parameter) for group in found for parameter in group["params"]]
    assert sorted(listed) == sorted(id(parameter) for parameter in student.parameters())
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    for group in found:
        (parameter,) = group["params"]
        scale = max(float(parameter.detach().square().mean().sqrt()), 1e-3)
        shared = "hpr_bank" in names[id(parameter)]
        assert group["lr"] == pytest.approx(1e-3 * scale * (0.25 if shared else 1), rel=1e-6)
        assert group["weight_decay"] == 0


def test_only_private_deltas_decay() -> None:
    teacher = teacher_of()
    profile = hpr.profile(teacher, batches())
    student = hpr.share(
        teacher, hpr.plan(teacher, profile, "60%", PlanOptions(only="encoder.*", operators=["tie + delta"])), profile
    )
    found = parameter_groups(student, 1e-3, 1.0, 0.01)
    names = {id(group["params"][0]): group["weight_decay"] for group in found}
    decaying = {name for name, parameter in student.named_parameters() if names[id(parameter)]}
    assert decaying
    assert all("hpr_bank" in name for name in decaying)
    deltas = {
        module_name(factor)
        for module in student.modules()
        for terms in terms_in(module).values()
        for term in terms[1:]
        for factor in term.factors
    }
    assert {name.split("factors.")[1].removesuffix(".weight") for name in decaying} == deltas


def test_a_model_without_gradients() -> None:
    with pytest.raises(HprError, match="nothing can be healed"):
        parameter_groups(teacher_of().requires_grad_(False), 1e-3, 1, 0)


# Data


@given(st.integers(0, 5), st.integers(1, 40), st.integers(1, 5), st.floats(0.1, 5))
def test_a_step_depends_on_the_seed_alone(seed: int, length: int, count: int, share: float) -> None:
    sources = {"one": [as_batch(torch.full((1,), float(i))) for i in range(count)]}
    sources["two"] = [as_batch(torch.full((1,), -1.0 - i)) for i in range(3)]
    one, other = (Schedule(sources, length, seed, shares={"one": share, "two": 1.0}) for _ in range(2))
    forward = [float(one[step].batch[POSITIONAL]) for step in range(length)]
    assert [float(other[step].batch[POSITIONAL]) for step in reversed(range(length))] == forward[::-1]
    for name, source in sources.items():  # every epoch of a source has each of its batches once
        seen = [value for value in forward if (value >= 0) == (name == "one")]
        for start in range(0, len(seen) - len(source) + 1, len(source)):
            assert len(set(seen[start : start + len(source)])) == len(source)


@given(st.integers(0, 5), st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_examples_of_one_shape_are_dealt_anew_in_every_epoch(seed: int, sizes: list[int]) -> None:
    total = sum(sizes)
    batches_of = list(torch.arange(total)[:, None].split(sizes))
    schedule = Schedule({"data": [{"x": batch, "y": 2 * batch} for batch in batches_of]}, 3 * len(sizes), seed)
    for epoch in range(3):
        drawn = [schedule[epoch * len(sizes) + place].batch for place in range(len(sizes))]
        assert sorted(int(value) for batch in drawn for value in batch["x"]) == list(range(total))
        assert all(torch.equal(2 * batch["x"], batch["y"]) for batch in drawn)
        assert max(len(batch["x"]) for batch in drawn) - min(len(batch["x"]) for batch in drawn) <= 1


def test_wrong_sources() -> None:
    with pytest.raises(HprError, match="there are no batches in 'data'"):
        Schedule({"data": []}, 3)
    with pytest.raises(HprError, match="must be above 0"):
        Schedule({"one": [1]}, 3, shares={"one": 0.0})


def test_numbers_vary_and_stay_finite() -> None:
    values = torch.randn(16, 20, 4, generator=torch.Generator().manual_seed(0))
    one, other = (vary(values, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, other)
    assert one.shape == values.shape
    assert torch.isfinite(one).all()
    assert not torch.allclose(one, values, atol=0.1)
    change = augmentation()
    assert change({"input": torch.arange(3)}, torch.Generator())["input"].tolist() == [0, 1, 2]
    pixels = {"pixel_values": values, "label": torch.arange(16)}
    assert torch.equal(change(pixels, torch.Generator().manual_seed(3))["pixel_values"], one)
    assert change(pixels, torch.Generator())["label"] is pixels["label"]
    tokens = {"input_ids": torch.tensor([[1, 7]])}
    assert augmentation()(tokens, torch.Generator()) is tokens


# Training


def test_healing_helps_and_touches_nothing_else(pair, caplog) -> None:
    teacher, student = pair
    student, before = copy_of(student).train(), weights_of(teacher)
    done: list[tuple[str, int, int]] = []
    recipe = Recipe(30, learning_rate=1e-2, checks=3)
    with reporting_to(lambda *step: done.append(step)), caplog.at_level("INFO", "hpr.healing"):
        found = train(student, teacher, batches(), batches(2, seed=5), recipe)
    assert found.after.mean < 0.8 * found.before.mean
    assert found.best_step in (10, 20, 30)
    assert [row["step"] for row in found.history] == [10, 20, 30]
    assert [message for message in caplog.messages if message.startswith("step")] == [
        f"step {row['step']}: loss {row['loss']:.4g}, divergence on the validation set {row['validation']:.4g} nats"
        for row in found.history
    ]
    assert found.gains == []
    assert min(row["validation"] for row in found.history) == pytest.approx(found.after.mean, rel=1e-6)
    assert done == [("heal", step, 30) for step in range(1, 31)]
    assert equal(weights_of(teacher), before)
    assert student.training
    assert not teacher.training
    assert all(parameter.grad is None for parameter in student.parameters())


def test_weights_of_the_start_are_kept_where_nothing_is_better(pair) -> None:
    teacher, student = pair
    student, before = copy_of(student), weights_of(student)
    found = train(student, teacher, batches(), batches(2, seed=5), Recipe(4, learning_rate=3.0, warmup=0, checks=2))
    assert found.best_step == 0
    assert found.after == found.before
    assert equal(weights_of(student), before)


def test_a_healed_model_reloads_bit_equal(pair, tmp_path: Path) -> None:
    teacher, student = pair
    student = copy_of(student)
    train(student, teacher, batches(), batches(2, seed=5), Recipe(4, checks=1))
    hpr.save(student, tmp_path / "out")
    again = tf.AutoModel.from_pretrained(tmp_path / "out")
    batch = batches(1)[0]
    assert torch.equal(again(**batch).last_hidden_state, student.eval()(**batch).last_hidden_state)


@pytest.mark.parametrize("objective", ["causal-lm", "masked-lm"])
def test_language_models(objective: str) -> None:
    kind = {"causal-lm": tf.LlamaForCausalLM, "masked-lm": tf.BertForMaskedLM}[objective]
    config = tf.LlamaConfig(**SIZES, vocab_size=60) if objective == "causal-lm" else CONFIG
    torch.manual_seed(0)
    teacher = kind(config).eval()
    student = copy_of(teacher)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    found = train(student, teacher, batches(), batches(2, seed=5), Recipe(20, learning_rate=1e-2, checks=2))
    assert found.after.mean < found.before.mean


def test_arrays_for_a_plain_module() -> None:
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).eval()
    student = copy_of(teacher)
    with torch.no_grad():
        student[0].weight += 0.3 * torch.randn(16, 6)
    data = list(torch.randn(64, 6).split(8))
    recipe = Recipe(40, learning_rate=3e-2, objective="classification", augment=augmentation())
    found = train(student, teacher, data[:-2], data[-2:], recipe)
    assert found.after.mean < 0.5 * found.before.mean


def test_labels_train_a_head() -> None:
    torch.manual_seed(0)
    config = tf.BertConfig(**SIZES, vocab_size=60, max_position_embeddings=24, num_labels=2)
    teacher = tf.BertForSequenceClassification(config).eval()
    student = copy_of(teacher)
    labelled_batches = [{**batch, "labels": (batch["input_ids"][:, 0] > 30).long()} for batch in batches(16)]

    def right(model: nn.Module) -> float:
        with torch.no_grad():
            return sum(float((model(b["input_ids"]).logits.argmax(-1) == b["labels"]).float().mean()) for b in labelled_batches)

    before = right(student)
    recipe = Recipe(60, learning_rate=5e-2, weights=Weights(outputs=0, labels=1))
    found = train(student, teacher, labelled_batches, labelled_batches[:2], recipe)
    assert found.history[-1]["loss"] < 0.7 * found.history[0]["loss"]
    assert right(student) > before + 4  # where labels count the validation loss is the loss itself, not likeness to the teacher


def test_a_loss_that_is_not_finite(pair) -> None:
    teacher, student = pair
    broken = copy_of(student)
    with torch.no_grad():
        next(broken.parameters()).fill_(float("nan"))
    with pytest.raises(HprError, match="not finite"):
        train(broken, teacher, batches(), batches(2, seed=5), Recipe(3))


@pytest.mark.parametrize("wrong", [{"accumulate": 0}, {"learning_rate": 0}, {"warmup": 1}, {"shared_rate": -1}, {"checks": 0}])
def test_wrong_recipes(wrong: dict[str, float]) -> None:
    with pytest.raises(HprError, match="must be"):
        Recipe(**wrong)


def test_durations(pair) -> None:
    assert [parse_duration(text) for text in ("500steps", "1 step", "20", "90s", "10min", "1.5h")] == [
        (500, None),
        (1, None),
        (20, None),
        (None, 90.0),
        (None, 600.0),
        (None, 5400.0),
    ]
    for wrong in ("", "0steps", "1.5steps", "ten minutes", "-3min"):
        with pytest.raises(HprError, match=r"amount|whole"):
            parse_duration(wrong)
    teacher, student = pair
    loss = loss_of(teacher, "hidden", Weights())
    assert steps_within(1e-9, student, loss, batches(2)) == 1
    assert steps_within(60, student, loss, batches(2)) > 1


# Resuming


def other_tokens(batch: dict[str, torch.Tensor], draw: torch.Generator) -> dict[str, torch.Tensor]:
    """Replace a fifth of the tokens by random ones."""
    ids = batch["input_ids"]
    chosen = torch.rand(ids.shape, generator=draw) < 0.2
    return {**batch, "input_ids": torch.where(chosen, torch.randint(3, 60, ids.shape, generator=draw), ids)}


RESUMED = Recipe(24, learning_rate=1e-3, checks=6, dropout=True, accumulate=2, augment=other_tokens)


def healed_weights(pair, folder: Path, recipe: Recipe) -> dict[str, torch.Tensor]:
    teacher, student = pair
    student = copy_of(student)
    train(student, teacher, batches(), batches(2, seed=5), replace(recipe, checkpoints=folder))
    return weights_of(student)


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[3])
import test_healing as t
from pathlib import Path
teacher = t.teacher_of()
profile = t.hpr.profile(teacher, t.batches())
student = t.hpr.share(teacher, t.hpr.plan(teacher, profile, "50%"), profile)

def stop(stage, done, total):
    if done == int(sys.argv[2]):
        os.kill(os.getpid(), signal.SIGKILL)

with t.reporting_to(stop):
    t.train(student, teacher, t.batches(), t.batches(2, seed=5), t.replace(t.RESUMED, checkpoints=sys.argv[1]))
"""


@pytest.mark.parametrize("step", [3, 11])
def test_killed_and_resumed_is_as_if_uninterrupted(pair, tmp_path: Path, step: int) -> None:
    expected = healed_weights(pair, tmp_path / "whole", RESUMED)
    command = [sys.executable, "-c", KILLED, str(tmp_path / "run"), str(step), str(Path(__file__).parent)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert equal(healed_weights(pair, tmp_path / "run", RESUMED), expected)


@pytest.mark.parametrize("family", ["vit", "mixtral"])
def test_families_whose_weights_are_renamed_on_saving_resume_too(family: str, tmp_path: Path) -> None:
    """Stopped after its first half and taken up again, or in one go: the same weights, and those of the best check."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(1)
    if family == "vit":
        config = tf.ViTConfig(**SIZES, image_size=8, patch_size=4, num_labels=5)
        teacher, goal = tf.ViTForImageClassification(config).eval(), "classification"
        given = [{"pixel_values": torch.randn(8, 3, 8, 8, generator=draw)} for _ in range(8)]
    else:
        more = {"vocab_size": 40, "num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
        teacher, goal = tf.MixtralForCausalLM(tf.MixtralConfig(**SIZES, **more)).eval(), "causal-lm"
        given = [{"input_ids": torch.randint(3, 40, (4, 9), generator=draw)} for _ in range(8)]
    before = hpr.share(teacher, hpr.presets.albert())
    recipe = Recipe(8, checks=4, learning_rate=5e-3, objective=goal)

    def healed(folder: Path, stop: int | None = None) -> tuple[dict[str, torch.Tensor], float, float]:
        student = copy_of(before)

        def interrupt(stage: str, done: int, total: int) -> None:
            if done == stop:
                raise KeyboardInterrupt

        with reporting_to(interrupt):
            found = train(student, teacher, given, given[:2], replace(recipe, checkpoints=folder))
        best = min(found.before.mean, *(row["validation"] for row in found.history))
        return weights_of(student), found.after.mean, best

    expected, after, best = healed(tmp_path / "whole")
    assert after == pytest.approx(best, rel=1e-6)
    with pytest.raises(KeyboardInterrupt):
        healed(tmp_path / "cut", stop=5)
    weights, _, _ = healed(tmp_path / "cut")
    assert equal(weights, expected)


def test_nothing_of_the_training_is_left_on_a_student() -> None:
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": 40, "num_key_value_heads": 2}
    teacher = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes)).eval()
    student = hpr.share(teacher, hpr.presets.albert())
    ids = [{"input_ids": torch.randint(3, 40, (4, 9), generator=torch.Generator().manual_seed(i))} for i in range(8)]
    own = set(vars(student))
    found = train(student, teacher, ids, ids[:2], Recipe(4, checks=1, learning_rate=5e-3, bf16=True, objective="causal-lm"))
    assert set(vars(student)) <= own
    assert student.config.use_cache
    assert student(**ids[0]).past_key_values is not None
    again = hpr.healing.train.GlobalLoss(teacher, describe(teacher), OBJECTIVES["causal-lm"], Weights())
    assert again.validate(student, ids[:2]).mean == found.after.mean  # measured in float32, as before


def test_layers_are_computed_again_where_that_is_wanted(monkeypatch) -> None:
    import transformers.modeling_utils as modeling

    calls, real = [], modeling.checkpoint

    def counted(*args, **kwargs):
        calls.append(1)
        return real(*args, **kwargs)

    monkeypatch.setattr(modeling, "checkpoint", counted)
    teacher = teacher_of()
    student = hpr.share(teacher, hpr.presets.albert())
    train(student, teacher, batches(), batches(2), Recipe(2, checks=1, checkpointing=True, dropout=True))
    assert len(calls) == 2 * 4
    with pytest.raises(HprError, match="say dropout=True with it"):
        Recipe(checkpointing=True)
    plain, rows = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), [torch.randn(4, 4)] * 2
    with pytest.raises(HprError, match="Sequential cannot compute activations again"):
        train(plain, plain, rows, rows, Recipe(1, checkpointing=True, dropout=True, objective="hidden"))


def test_rounded_weights_are_refused(pair) -> None:
    teacher, student = pair
    with pytest.raises(HprError, match=r"is bfloat16: most steps would be lost in rounding. Heal student.float\(\)"):
        train(copy_of(student).bfloat16(), teacher, batches(), batches(2), Recipe(1))


def test_the_checkpoints_of_another_student_or_data_are_refused(pair, tmp_path: Path) -> None:
    teacher, student = pair
    recipe = Recipe(2, checks=1, checkpoints=tmp_path)
    train(copy_of(student), teacher, batches(), batches(2), recipe)
    other = copy_of(student)
    with torch.no_grad():
        other.embeddings.LayerNorm.bias.add_(0.1)
    for changed, data, validation in ((other, batches(), batches(2)), (student, batches(seed=8), batches(2, seed=9))):
        with pytest.raises(HprError, match=r"a run with other (student|data, validation):"):
            train(copy_of(changed), teacher, data, validation, recipe)


def test_a_run_that_is_over_gives_its_weights_from_wherever_the_folder_is_now(pair, tmp_path: Path) -> None:
    teacher, student = pair
    recipe = Recipe(6, checks=3)
    first, second = copy_of(student), copy_of(student)
    train(first, teacher, batches(), batches(2), replace(recipe, checkpoints=tmp_path / "here"))
    (tmp_path / "here").rename(tmp_path / "there")
    train(second, teacher, batches(), batches(2), replace(recipe, checkpoints=tmp_path / "there"))
    assert equal(weights_of(first), weights_of(second))


def test_half_a_checkpoint_is_removed_and_another_run_refused(pair, tmp_path: Path) -> None:
    recipe = replace(RESUMED, duration=8, checks=2)
    expected = healed_weights(pair, tmp_path, recipe)
    newest = last_checkpoint(tmp_path)
    assert newest is not None
    assert newest.name == "checkpoint-8"
    state = newest / "trainer_state.json"
    state.write_text(state.read_text(encoding="utf-8")[:-50], encoding="utf-8")
    assert equal(healed_weights(pair, tmp_path, recipe), expected)
    with pytest.raises(HprError, match=r"a run with other learning_rate \(0.001, now 0.002\)"):
        healed_weights(pair, tmp_path, replace(recipe, learning_rate=2e-3))
    (tmp_path / "recipe.json").unlink()
    with pytest.raises(HprError, match="checkpoints of something else"):
        healed_weights(pair, tmp_path, recipe)


def test_checkpoints_go_where_nothing_is_lost(tmp_path) -> None:
    """The place is looked at before a step is taken, and nothing is left in it."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for place, words in (
        ("file", "is a file: choose a folder"),
        ("file/below", "file"),
        ("mine", "has content that is not of a run that could continue"),
        ("out/checkpoints", "where the result is written at the end"),
    ):
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(CheckpointError, match=words):
            check_place(tmp_path / place, tmp_path / "out")
        assert sorted(tmp_path.rglob("*")) == before
    check_place(tmp_path / "new", tmp_path / "out")
    assert not (tmp_path / "new" / FACTS).exists()
