"""Stages of healing: which step is in which, what forcing and blending do to a pass, and targets on disk."""

import copy
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import transformers as tf
from hypothesis import given
from hypothesis import strategies as st
from test_healing import batches, copy_of, equal, loss_of, pair, teacher_of, weights_of  # noqa: F401
from torch import nn

from hpr.anatomy.describe import describe
from hpr.errors import HprError
from hpr.healing.loss import Weights
from hpr.healing.recipe import Recipe
from hpr.healing.resume import hash_of
from hpr.healing.stages import BLOCKS, RAMP, WHOLE, BlockwiseLoss, Stages, TeacherForcing, WeightBlend, gains, stages_of
from hpr.healing.teacher_cache import TargetCache, TeacherTargets
from hpr.healing.train import train


@given(st.integers(1, 50), st.floats(0, 1), st.floats(0, 1))
def test_every_step_has_a_stage_and_stages_follow_each_other(steps: int, blocks: float, ramp: float) -> None:
    stages = stages_of(Recipe(blocks=blocks, ramp=min(ramp, 1 - blocks)), steps)
    names = [stages.at(step) for step in range(steps)]
    order = [BLOCKS, RAMP, WHOLE]
    assert names == sorted(names, key=order.index)
    assert [name for name in order if name in names] == list(stages.ends.values())
    assert max(stages.ends) == steps
    blends = [stages.blend(step) for step in range(steps) if names[step] == RAMP]
    assert blends == sorted(blends)
    assert all(0 < blend < 1 for blend in blends)


def test_gains_follow_the_stages() -> None:
    rows = [{"step": 2, "validation": 0.5}, {"step": 4, "validation": 0.4}, {"step": 10, "validation": 0.1}]
    found = gains(rows, Stages(10, 2, 0), before=1.0)
    assert [(row["stage"], row["steps"], row["before"], row["after"]) for row in found] == [
        (BLOCKS, 2, 1.0, 0.5),
        (WHOLE, 8, 0.5, 0.1),
    ]


def test_shares_of_steps_beyond_all_are_refused() -> None:
    with pytest.raises(HprError, match="shares of the steps"):
        Recipe(blocks=0.7, ramp=0.4)


def test_forced_layers_get_what_the_teacher_got(pair) -> None:  # noqa: F811
    """With one layer spoiled, only that one has an error of its own."""
    teacher, _ = pair
    student = copy_of(teacher)
    nn.init.zeros_(student.encoder.layer[1].output.dense.weight)
    forcing = TeacherForcing(student, teacher, describe(teacher))
    forcing.active = True
    loss = BlockwiseLoss(loss_of(teacher, "hidden", Weights(hidden=1.0)), forcing)
    batch = batches()[0]
    parts = loss(student, batch).floats()
    with torch.no_grad():
        hidden = teacher(**batch, output_hidden_states=True).hidden_states
        error = (student.encoder.layer[1](hidden[1]) - hidden[2]).square().sum() / hidden[2].square().sum()
    assert parts["outputs"] == 0
    assert parts["hidden"] == pytest.approx(float(error) / (4 + 1), rel=1e-5)  # four layers, and what the first is given
    forcing.active = False
    free = loss(student, batch)
    assert free.parts["outputs"] > 0
    assert free.total == loss_of(teacher, "hidden", Weights(hidden=1.0))(student, batch).total
    forcing.close()
    assert not teacher.encoder.layer[0]._forward_pre_hooks


def test_gradients_do_not_cross_forced_layers(pair) -> None:  # noqa: F811
    teacher, student = pair
    student = copy_of(student)
    forcing = TeacherForcing(student, teacher, describe(teacher))
    forcing.active = True
    loss = BlockwiseLoss(loss_of(teacher, "hidden", Weights()), forcing)(student, batches()[0])
    forcing.close()
    assert loss.total > 0
    forcing = TeacherForcing(student, teacher, describe(teacher))
    forcing.active = True
    with torch.no_grad():
        teacher(**batches()[0])
    student(**batches()[0]).last_hidden_state.sum().backward()  # of the last layer alone, as all below give way
    forcing.close()
    assert student.encoder.layer[3].attention.self.query.bias.grad is not None
    assert student.encoder.layer[2].attention.self.query.bias.grad is None


def test_a_decoder_is_given_the_teachers_encoder_output() -> None:
    torch.manual_seed(0)
    sizes = {"encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = tf.BartConfig(**sizes, **heads, d_model=16, vocab_size=40, max_position_embeddings=24)
    teacher = tf.BartForConditionalGeneration(config).eval()
    student = copy.deepcopy(teacher)
    nn.init.normal_(student.model.encoder.layers[1].fc2.weight)
    ids = torch.randint(3, 40, (4, 9), generator=torch.Generator().manual_seed(1))
    batch = {"input_ids": ids, "labels": ids[:, :7].clone()}
    batch["labels"][0, 5:] = -100
    forcing = TeacherForcing(student, teacher, describe(teacher))
    forcing.active = True
    loss = BlockwiseLoss(loss_of(teacher, "seq2seq", Weights(hidden=1.0)), forcing)
    found = loss(student, batch)
    found.total.backward()
    forcing.close()
    assert found.parts["outputs"] < 1e-9  # only the encoder's last layer is wrong, and nothing above sees it
    assert student.model.encoder.layers[1].fc2.weight.grad.abs().max() > 0
    assert student.model.encoder.layers[0].fc2.weight.grad.abs().max() == 0
    mask = loss.mask(batch, "decoder.layers.0", torch.zeros(4, 7, 16))
    assert mask[0].tolist() == [1] * 5 + [0] * 2
    assert loss.mask(batch, "encoder.layers.0", torch.zeros(4, 9, 16)).all()


def test_a_ramp_starts_at_the_original_and_ends_at_the_student(pair) -> None:  # noqa: F811
    teacher, student = pair
    student, batch = copy_of(student), batches()[0]
    plain = student(**batch).last_hidden_state
    ramp = WeightBlend(student, teacher)
    assert torch.equal(student(**batch).last_hidden_state, plain)
    ramp.share = 0.0
    own = {name: value for name, value in teacher.state_dict().items() if not name.endswith(".weight") or "LayerNorm" in name}
    student.load_state_dict(own, strict=False)  # biases and norms are the student's throughout
    assert torch.allclose(student(**batch).last_hidden_state, teacher(**batch).last_hidden_state, atol=1e-5)
    ramp.close()
    assert not torch.allclose(student(**batch).last_hidden_state, teacher(**batch).last_hidden_state, atol=1e-2)


def test_a_ramp_from_the_weights_of_another_model_is_refused(pair) -> None:  # noqa: F811
    teacher, student = pair
    torch.manual_seed(5)
    other = tf.BertModel(teacher.config).eval()
    with pytest.raises(HprError, match="give the aligned teacher as original"):
        train(copy_of(student), teacher, batches(), batches(2, seed=2), Recipe(4, ramp=0.5, original=other))


def test_a_ramp_gives_the_teacher_no_gradient(pair) -> None:  # noqa: F811
    teacher, student = pair
    student, teacher = copy_of(student), copy.deepcopy(teacher)
    ramp = WeightBlend(student, teacher)
    ramp.share = 0.5
    student(**batches()[0]).last_hidden_state.sum().backward()
    ramp.close()
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize(
    "stages", [{"blocks": 0.5}, {"ramp": 0.5}, {"blocks": 0.25, "ramp": 0.25, "checkpointing": True, "dropout": True}]
)
def test_stages_heal_and_say_what_each_gained(pair, stages) -> None:  # noqa: F811
    teacher, student = pair
    student = copy_of(student)
    found = train(student, teacher, batches(), batches(2, seed=2), Recipe(8, checks=2, learning_rate=1e-3, **stages))
    assert sum(row["steps"] for row in found.gains) == 8
    assert all(row["after"] is not None for row in found.gains)
    assert found.gains[0]["before"] == found.before.mean
    assert found.after.mean < found.before.mean or "ramp" in stages  # eight steps are too few for a ramp
    assert not any(getattr(module, "gradient_checkpointing", False) for module in student.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in student.modules())


def test_targets_are_made_once(tmp_path) -> None:
    cache, calls = TargetCache(tmp_path, torch.device("cpu")), []

    def make() -> TeacherTargets:
        calls.append(1)
        return TeacherTargets(torch.randn(3, 4), torch.ones(3), {"encoder.0": torch.randn(3, 2)})

    first, second = cache(3, make), cache(3, make)
    assert len(calls) == 1
    assert torch.equal(first.predictions, second.predictions)
    assert torch.equal(first.hidden["encoder.0"], second.hidden["encoder.0"])
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:40])
    cache(3, make)
    assert len(calls) == 2
    cache(4, make)
    assert len(calls) == 3


def test_batches_differ_in_their_hash() -> None:
    assert hash_of(batches()[0]) == hash_of(batches()[0]) != hash_of(batches()[1])


def test_targets_on_disk_change_nothing(pair, tmp_path, monkeypatch) -> None:  # noqa: F811
    teacher, student = pair
    recipe = Recipe(6, checks=2, weights=Weights(hidden=0.5))
    kept, plain = copy_of(student), copy_of(student)
    given = [{"input_ids": batch["input_ids"][:, : 6 + place]} for place, batch in enumerate(batches(3))]
    train(kept, teacher, given, batches(2, seed=2), replace(recipe, checkpoints=tmp_path / "kept"))
    assert len(list((tmp_path / "kept" / "targets").iterdir())) == 3
    monkeypatch.setattr("hpr.healing.teacher_cache.LIMIT", -1)
    train(plain, teacher, given, batches(2, seed=2), replace(recipe, checkpoints=tmp_path / "plain"))
    assert not list((tmp_path / "plain" / "targets").iterdir())
    assert equal(weights_of(kept), weights_of(plain))


def test_plain_healing_does_not_import_the_stages() -> None:
    code = "import sys, hpr; hpr.heal; hpr.Recipe(); hpr.extras.OnlineHealer; assert 'hpr.healing.stages' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
