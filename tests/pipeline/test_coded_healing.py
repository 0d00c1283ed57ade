"""Compress to a number of bytes and heal: the record tells it, the file keeps the budget, wrong settings are named at once."""

import json
import random
from pathlib import Path

import pytest
import torch
import transformers as tf

import hpr
from hpr.data.loaded_model import LoadedModel
from hpr.evaluation.cost import disk_bytes
from hpr.nn.coded import codes_of
from hpr.runtime.progress import reporting_to

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(35))]
DRAW = random.Random(0)
TEXTS = [f"word{n // 30} word{n % 30} " + " ".join(DRAW.choices(WORDS[5:], k=DRAW.randint(2, 6))) for n in range(256)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    path.write_text("\n".join(WORDS), encoding="utf-8")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32, "vocab_size": 40}
    model = tf.BertModel(tf.BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=24)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
    return hpr.open_model(model, tokenizer=tf.BertTokenizer(str(path), model_max_length=24), objective="embedding")


def test_the_record_and_the_report_tell_the_healing_and_the_file_keeps_the_budget(loaded: LoadedModel, tmp_path: Path) -> None:
    plain = hpr.compress(loaded, "8%bytes", TEXTS)
    made = hpr.compress(loaded, "8%bytes", TEXTS, tmp_path / "out", heal=hpr.Recipe("240steps", checks=3, learning_rate=3e-4))
    healing = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))["healing"]
    assert healing == made.metrics["healing"]
    assert healing["after"] < healing["before"]
    assert [row["step"] for row in healing["history"]] == [80, 160, 240]
    assert healing["best_step"] in (80, 160, 240)
    assert made.metrics["timing"]["heal"] > 0
    assert list(made.metrics["timing"]) == ["data", "profile", "round", "heal", "evaluate"]
    for name in ("report.html", "README.md"):
        assert "240 steps" in (tmp_path / "out" / name).read_text(encoding="utf-8")
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size <= 0.08 * disk_bytes(loaded.model)
    assert size == disk_bytes(made.student) == made.plan.diagnostics["bytes"] == made.metrics["sizes"]["after"]["bytes"]
    assert made.plan.rounding == plain.plan.rounding
    assert any(one.stream != codes_of(plain.student)[site].stream for site, one in codes_of(made.student).items())
    again = tf.AutoModel.from_pretrained(tmp_path / "out")
    assert all(torch.equal(one, made.student.state_dict()[name]) for name, one in again.state_dict().items())
    hpr.save(again, tmp_path / "again")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert weights[0] == weights[1]
    with pytest.raises(hpr.HprError, match="rounded and coded and cannot be healed"):
        hpr.heal(made.student, loaded, TEXTS)


def test_what_is_wrong_is_said_before_anything_is_measured(loaded: LoadedModel, tmp_path: Path) -> None:
    def never(*_: object) -> None:
        raise AssertionError("it has started")

    for heal, message in (
        ("some", "is no amount of healing"),
        (hpr.Recipe("2steps", checkpoints=tmp_path), "checkpoints is .*cannot be continued: leave checkpoints out"),
        (hpr.Recipe("2steps", ramp=0.5), "ramp is 0.5"),
    ):
        with pytest.raises(hpr.HprError, match=message), reporting_to(never):
            hpr.compress(loaded, "8%bytes", TEXTS, tmp_path / "none", heal=heal)
    assert not (tmp_path / "none").exists()


def test_shared_factors_are_rounded_and_healed_within_their_bytes(loaded: LoadedModel, tmp_path: Path) -> None:
    options = hpr.PlanOptions(bytes="15%bytes", plans=2)
    plain = hpr.compress(loaded, "60%", TEXTS, options=options)
    recipe = hpr.Recipe("160steps", checks=2, learning_rate=3e-4)
    made = hpr.compress(loaded, "60%", TEXTS, tmp_path / "out", options, recipe)
    assert made.metrics["healing"]["after"] < made.metrics["healing"]["before"]
    assert list(made.metrics["timing"]) == ["data", "profile", "plan", "rescore", "refit", "round", "heal", "evaluate"]
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size <= 0.15 * disk_bytes(loaded.model)
    assert size == disk_bytes(made.student) == made.plan.diagnostics["bytes"] == made.metrics["sizes"]["after"]["bytes"]
    assert made.plan.rounding == plain.plan.rounding
    assert made.plan.rounding is not None
    assert made.plan.rounding.factors
    assert made.plan.parameters(hpr.describe(loaded)) <= made.plan.budget.parameters
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "stored by its entropy" in card
    again = tf.AutoModel.from_pretrained(tmp_path / "out")
    assert all(torch.equal(one, made.student.state_dict()[name]) for name, one in again.state_dict().items())
    with pytest.raises(hpr.HprError, match="blocks is"):
        hpr.compress(loaded, "60%", TEXTS, options=options, heal=hpr.Recipe("160steps", blocks=0.5))
