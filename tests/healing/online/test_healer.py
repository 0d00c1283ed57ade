"""Learning on: a validation loss that no stream can raise, exact returns, crashes at any point, drift, and a fair memory."""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers as tf
from test_healing import batches, copy_of, pair, teacher_of  # noqa: F401
from torch import nn

import hpr
from hpr.errors import HprError
from hpr.healing.loss import Weights
from hpr.healing.online.drift import WARM, Drift
from hpr.healing.online.healer import OnlineHealer
from hpr.healing.online.journal import Journal, flat, optimiser_tensors, unflat
from hpr.healing.online.options import OnlineOptions
from hpr.runtime.batch import POSITIONAL, as_batch


def state_of(healer: OnlineHealer) -> dict[str, torch.Tensor]:
    """All that decides what it does next."""
    weights = {f"w.{name}": value.clone() for name, value in healer.student.state_dict().items()}
    moments = {f"o.{name}": value.clone() for name, value in optimiser_tensors(healer.optimiser).items()}
    return weights | moments | {f"m.{name}": value for name, value in flat(healer.memory).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_student_learns_on_from_its_teacher(pair) -> None:  # noqa: F811
    teacher, student = pair
    healer = OnlineHealer(copy_of(student), batches(3, seed=50), teacher, OnlineOptions(2e-3, every=4, replay=8))
    found = [healer.update(batch) for batch in batches(24)]
    assert [update.step for update in found] == list(range(1, 25))
    assert [update.step for update in found if update.validation is not None] == [4, 8, 12, 16, 20, 24]
    assert healer.measure() < healer.start
    assert healer.best <= healer.start
    assert len(healer.memory) == 8


def labelled(count: int, seed: int = 1) -> list[dict[str, torch.Tensor]]:
    """Texts with a class that their first token says."""
    found = batches(count, seed)
    return [{**batch, "labels": (batch["input_ids"][:, 0] > 30).long()} for batch in found]


def classifier() -> nn.Module:
    teacher = teacher_of(tf.BertForSequenceClassification)
    profile = hpr.profile(teacher, batches(), "classification")
    return hpr.share(teacher, hpr.plan(teacher, profile, "60%"), profile)


def test_a_corrupted_stream_leaves_the_validation_loss_no_worse() -> None:
    healer = OnlineHealer(classifier(), labelled(3, seed=90), options=OnlineOptions(5e-3, every=4, tolerance=0.0))
    stream = labelled(60)
    for place in range(0, 60, 5):  # every fifth is spoilt, in one of four ways
        broken = dict(stream[place])
        kind = place // 5 % 4
        if kind == 0:
            broken["labels"] = 1 - broken["labels"]
        elif kind == 1:
            broken = {"inputs_embeds": torch.full((8, 12, 32), float("nan")), "labels": broken["labels"]}
        elif kind == 2:
            broken["input_ids"] = broken["input_ids"][:, :0]
        else:
            broken["labels"] = broken["labels"][:3]
        stream[place] = broken
    found = [healer.update(batch) for batch in stream]
    assert healer.measure() <= healer.start
    assert healer.measure() == pytest.approx(healer.best)
    refused = [update for update in found if update.refused]
    assert {update.step - 1 for update in refused} == {place for place in range(0, 60, 5) if place // 5 % 4}
    assert any("not finite" in update.refused for update in refused)
    assert any("input_ids holds no values" in update.refused for update in refused)
    assert any("different numbers of examples: input_ids 8, labels 3" in update.refused for update in refused)
    assert all(torch.isfinite(value).all() for value in healer.student.state_dict().values())


def test_what_hurts_is_undone_exactly(pair) -> None:  # noqa: F811
    teacher, student = pair
    healer = OnlineHealer(copy_of(student), batches(2, seed=50), teacher, OnlineOptions(1e-3, every=2))
    for batch in batches(4):
        healer.update(batch)
    before = state_of(healer)
    healer.rates = [1e4 * rate for rate in healer.rates]
    assert not healer.update(batches(1, seed=7)[0]).rolled_back
    assert not same(state_of(healer), before)
    assert healer.update(batches(1, seed=8)[0]).rolled_back
    assert same(state_of(healer), before)


def test_outputs_that_are_no_longer_finite_are_undone(pair) -> None:  # noqa: F811
    teacher, student = pair
    healer = OnlineHealer(copy_of(student), batches(2, seed=50), teacher, OnlineOptions(every=1))
    healer.rates = [1e30] * len(healer.rates)
    before = state_of(healer)
    update = healer.update(batches(1)[0])
    assert update.rolled_back
    assert update.validation is None
    assert same(state_of(healer), before)


def test_what_is_refused_changes_nothing(pair) -> None:  # noqa: F811
    teacher, student = pair
    healer = OnlineHealer(copy_of(student), batches(2, seed=50), teacher, OnlineOptions(every=100))
    before = state_of(healer)
    update = healer.update({"input_ids": torch.full((2, 4), 999)})
    assert "input_ids holds 999, which is not one of 0 to" in update.refused
    assert same(state_of(healer), before)
    for batch, fault in (
        ({}, "is empty"),
        ({"pixels": torch.ones(2, 4)}, "has no 'input_ids', which every batch for validation has"),
        ({"input_ids": torch.ones(2, 0, dtype=torch.long)}, "input_ids holds no values"),
        ({"input_ids": torch.ones(4, dtype=torch.long)}, "input_ids has 1 dimensions, and 2 in the batches"),
        ({"input_ids": torch.ones(2, 4)}, "input_ids is float32, and int64 in the batches"),
        ({"input_ids": torch.ones(2, 4).long(), "labels": torch.ones(3)}, "numbers of examples: input_ids 2, labels 3"),
        ({"input_ids": torch.ones(2, 99, dtype=torch.long)}, "input_ids has 99 positions, and the model takes 24"),
    ):
        assert fault in healer.update(batch).refused
    assert same(state_of(healer), before)
    with pytest.raises(HprError, match="'x' of a batch is a list, not a tensor"):
        healer.update({"x": [1]})
    assert healer.step == 8


def test_models_of_pictures_are_read_as_they_are() -> None:
    """They have no table of tokens; nothing of a batch is out of range for them but classes that they lack."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = tf.ViTForImageClassification(tf.ViTConfig(**shape, image_size=16, patch_size=8, num_labels=3)).eval()
    data = [{"pixel_values": torch.randn(4, 3, 16, 16), "labels": torch.tensor([0, 1, 2, 1])} for _ in range(3)]
    healer = OnlineHealer(model, data[:1], options=OnlineOptions(weights=Weights(outputs=0.0, labels=1.0)))
    assert healer.update(data[1]).refused is None
    assert (
        "labels holds 7, which is not one of 0 to 2" in healer.update({**data[2], "labels": torch.tensor([0, 7, 2, 1])}).refused
    )


def test_an_input_that_the_model_itself_refuses_is_refused_and_a_bug_is_raised(monkeypatch) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = tf.ViTForImageClassification(tf.ViTConfig(**shape, image_size=16, patch_size=8, num_labels=3)).eval()
    data = [{"pixel_values": torch.randn(2, 3, size, size), "labels": torch.tensor([0, 1])} for size in (16, 24)]
    healer = OnlineHealer(model, data[:1], options=OnlineOptions(weights=Weights(outputs=0.0, labels=1.0)))
    assert "the model cannot read the batch (ValueError: Input image size" in healer.update(data[1]).refused

    def broken(**inputs: torch.Tensor) -> None:
        raise KeyError("a name that is not there")

    monkeypatch.setattr(model, "forward", broken)
    with pytest.raises(KeyError, match="a name that is not there"):
        healer.update(data[0])


def test_the_newest_of_several_snapshots_of_a_step_is_read(tmp_path: Path) -> None:
    journal, model = Journal(tmp_path), nn.Linear(2, 2)
    for step, number in ((4, 1), (4, 2), (4, 3), (5, 4)):
        journal.snapshot(step, model, {"x": torch.tensor(float(number))}, {"n": number})
        assert journal.restore(model)[1] == {"n": number}
    assert [path.name for path in tmp_path.glob("snapshot-*")] == ["snapshot-000000005"]


def test_lack_of_memory_is_no_damage_of_a_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal, model = Journal(tmp_path), nn.Linear(2, 2)
    journal.snapshot(1, model, {"x": torch.ones(1)}, {"n": 1})
    monkeypatch.setattr("hpr.healing.online.journal.load_model", lambda *_: torch.empty(1 << 50))
    with pytest.raises(RuntimeError, match="memory"):
        journal.restore(model)


def test_it_goes_on_where_it_was(pair, tmp_path: Path) -> None:  # noqa: F811
    teacher, student = pair
    options = OnlineOptions(learning_rate=2e-2, every=3, replay=4)  # so high that some is undone
    validation, stream = batches(2, seed=50), batches(11)
    straight = OnlineHealer(copy_of(student), validation, teacher, options)
    assert {straight.update(batch).rolled_back for batch in stream} == {True, False}
    for start in range(0, 11, 4):  # four at a time: in the middle between two checks
        healer = OnlineHealer.open(tmp_path, copy_of(student), validation, teacher, options)
        assert healer.step == start
        for batch in stream[start : start + 4]:
            healer.update(batch)
    assert same(state_of(OnlineHealer.open(tmp_path, copy_of(student), validation, teacher, options)), state_of(straight))
    with pytest.raises(HprError, match=r"a run with other every \(3, now 5\)"):
        OnlineHealer.open(tmp_path, copy_of(student), validation, teacher, replace(options, every=5))
    with pytest.raises(HprError, match="other validation"):
        OnlineHealer.open(tmp_path, copy_of(student), batches(2, seed=51), teacher, options)
    (tmp_path / "snapshot-000000009" / "weights.safetensors").write_bytes(b"half")
    with pytest.raises(HprError, match="is damaged"):
        OnlineHealer.open(tmp_path, copy_of(student), validation, teacher, options)


KILLED = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)  # a child of a fork has no other threads
from test_healer import *
from test_healing import *

folder, stream, draw = Path(sys.argv[1]), batches(400), random.Random(0)
teacher = teacher_of()
profile = hpr.profile(teacher, batches())
student = hpr.share(teacher, hpr.plan(teacher, profile, "50%"), profile)
options = OnlineOptions(learning_rate=2e-2, every=3, replay=4)
made = lambda place: OnlineHealer.open(place, copy_of(student), batches(2, seed=50), teacher, options)
reached = 0
for _ in range(20):
    child = os.fork()
    if child == 0:
        healer = made(folder)
        while healer.step < len(stream):
            healer.update(stream[healer.step])
        os._exit(0)
    time.sleep(draw.uniform(0.05, 0.6))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    step = made(folder).step
    assert step >= reached
    reached = step
assert 0 < reached < len(stream), reached
healer, straight = made(folder), OnlineHealer(copy_of(student), batches(2, seed=50), teacher, options)
while straight.step < healer.step:
    straight.update(stream[straight.step])
one, other = state_of(healer), state_of(straight)
assert same(one, other), [name for name in one if name not in other or not torch.equal(one[name], other[name])]
print("killed and resumed", reached)
"""


def test_killed_twenty_times(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path / "run")]
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert "killed and resumed" in done.stdout


def test_drift() -> None:
    draw = torch.Generator().manual_seed(0)
    usual = (torch.randn(300, generator=draw) * 0.2).exp().tolist()
    drift = Drift()
    assert not any(drift(loss) for loss in usual)
    later = [drift(2 * loss) for loss in usual[:20]]
    assert any(later[:6])
    assert later.count(True) == 1  # what came after the alarm is the usual now
    assert drift.count == 20 - later.index(True)
    assert WARM < 20


def test_the_memory_is_a_fair_sample(pair) -> None:  # noqa: F811
    teacher, student = pair
    kept: Counter[int] = Counter()
    for seed in range(60):
        healer = OnlineHealer(student, batches(1), teacher, OnlineOptions(replay=4, seed=seed))
        for number in range(20):
            healer._remember(torch.tensor([number]))
        kept.update(int(batch) for batch in healer.memory)
    assert sum(kept.values()) == 240
    assert max(kept.values()) < 3 * 12  # 12 of each expected
    assert len(kept) == 20


def test_batches_on_disk(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.note(2, {"x": torch.ones(2, 3)})
    journal.note(1, as_batch(torch.arange(3)))
    assert [step for step, _ in journal.after(0)] == [1, 2]
    assert torch.equal(next(iter(journal.after(0)))[1][POSITIONAL], torch.arange(3))
    assert [path.name for path in (tmp_path / "batches").iterdir() if "partial" in path.name] == []
    several = [{"a": torch.ones(1), "b": torch.zeros(2)}, as_batch(torch.ones(3))]
    again = unflat(flat(several))
    assert again[0].keys() == several[0].keys()
    assert torch.equal(again[1][POSITIONAL], torch.ones(3))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"every": 0}, "every 0"),
        ({"learning_rate": 0}, "learning_rate 0"),
        ({"replay": -1}, "replay -1"),
        ({"tolerance": -0.1}, "tolerance -0.1"),
    ],
)
def test_wrong_settings(wrong, message) -> None:
    with pytest.raises(HprError, match=message):
        OnlineOptions(**wrong)


def test_what_it_needs(pair) -> None:  # noqa: F811
    teacher, student = pair
    with pytest.raises(HprError, match="validation is empty"):
        OnlineHealer(student, [], teacher)
    with pytest.raises(HprError, match="follow a teacher: give one, or let labels alone count"):
        OnlineHealer(student, batches(1), options=OnlineOptions(weights=Weights()))
    with pytest.raises(HprError, match="labels count in the loss"):
        OnlineHealer(student, batches(1))
