"""Arguments of another type than a function takes: an error that names the argument, its type and what to give."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

import hpr
from hpr.healing.loss import Weights

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
BATCHES = [{"input_ids": torch.arange(4, 22).reshape(2, 9) + shift} for shift in (0, 7)]


@pytest.fixture(scope="module")
def made() -> tuple[Any, ...]:
    """A model, its profile, a plan and a student."""
    torch.manual_seed(0)
    model = tf.BertForMaskedLM(tf.BertConfig(**SMALL)).eval()  # type: ignore[arg-type]
    profile = hpr.profile(model, BATCHES)
    plan = hpr.plan(model, profile, "75%")
    return model, profile, plan, hpr.share(model, plan, profile)


CALLS: dict[str, Callable[..., Any]] = {
    "the profile": lambda bad, model, profile, plan, student: hpr.plan(model, bad, "75%"),
    "options": lambda bad, model, profile, plan, student: hpr.plan(model, profile, "75%", bad),
    "the plan": lambda bad, model, profile, plan, student: hpr.share(model, bad, profile),
    "the profile ": lambda bad, model, profile, plan, student: hpr.share(model, plan, bad),
    "the model": lambda bad, model, profile, plan, student: hpr.save(bad, "never"),
    "the model ": lambda bad, model, profile, plan, student: hpr.unshare(bad),
    "the model  ": lambda bad, model, profile, plan, student: hpr.evaluate(bad, model, BATCHES),
    "the model   ": lambda bad, model, profile, plan, student: hpr.heal(bad, model, BATCHES),
    "the model    ": lambda bad, model, profile, plan, student: hpr.load(bad, "never"),
    "the plan ": lambda bad, model, profile, plan, student: hpr.refit(student, model, BATCHES, bad, profile),
    "the recipe": lambda bad, model, profile, plan, student: hpr.heal(student, model, BATCHES, bad),
    "heal": lambda bad, model, profile, plan, student: hpr.compress(model, "75%", BATCHES, heal=bad),
    "labels": lambda bad, model, profile, plan, student: hpr.evaluate(student, model, BATCHES, labels=bad),
    "repeats": lambda bad, model, profile, plan, student: hpr.evaluate(student, model, BATCHES, repeats=bad),
    "files": lambda bad, model, profile, plan, student: hpr.save(student, "never", files=bad),
    "the folder": lambda bad, model, profile, plan, student: hpr.load(model, bad),
    "the path of a plan": lambda bad, model, profile, plan, student: hpr.Plan.load(bad),
    "the path of a profile": lambda bad, model, profile, plan, student: hpr.Profile.load(bad),
}


@pytest.mark.parametrize("bad", [object(), 0.5, {"a": 1}], ids=lambda bad: type(bad).__name__)
@pytest.mark.parametrize("name", CALLS)
def test_an_argument_of_another_type_is_named(
    made: tuple[Any, ...], name: str, bad: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    words = "the text of 'a' in files" if name == "files" and isinstance(bad, dict) else name.strip()
    found = "int" if words.startswith("the text") else type(bad).__name__
    with pytest.raises(hpr.HprError, match=re.escape(f"{words} is of type {found}: give ")):
        CALLS[name](bad, *made)
    assert not list(tmp_path.iterdir())


def test_what_is_given_in_place_of_a_name(made: tuple[Any, ...]) -> None:
    model, _, _, student = made
    for bad in (["hidden"], {"hidden": 1}, 5):
        with pytest.raises(hpr.HprError, match="no objective"):
            hpr.profile(model, BATCHES, bad)  # type: ignore[arg-type]
    with pytest.raises(hpr.HprError, match="a str has no save_pretrained"):
        hpr.save(student, "never", tokenizer="bert")
    with pytest.raises(hpr.HprError, match=r"is a folder: give the plan\.json in it"):
        hpr.Plan.load(Path(__file__).parent)
    assert not Path("never").exists()


@pytest.mark.parametrize(
    ("settings", "given", "words"),
    [
        (hpr.PlanOptions, {"refit": "yes"}, "refit of PlanOptions is 'yes', of type str: give bool or None"),
        (hpr.PlanOptions, {"operators": 3}, "operators of PlanOptions is 3, of type int: give tuple or None or list"),
        (hpr.PlanOptions, {"operators": [3]}, "one of the operators is of type int"),
        (hpr.PlanOptions, {"only": ["*"]}, "only of PlanOptions is"),
        (hpr.Recipe, {"learning_rate": "1e-3"}, "learning_rate of Recipe is '1e-3', of type str: give float or int"),
        (hpr.Recipe, {"learning_rate": True}, "learning_rate of Recipe is True, of type bool"),
        (hpr.Recipe, {"checks": 2.5}, "checks of Recipe is 2.5, of type float: give int"),
        (hpr.Recipe, {"weights": {"hidden": 1.0}}, "weights of Recipe is {'hidden': 1.0}, of type dict: give Weights"),
        (hpr.Recipe, {"dropout": 1}, "dropout of Recipe is 1, of type int: give bool"),
        (Weights, {"hidden": None}, "hidden of Weights is None, of type NoneType: give float or int"),
    ],
)
def test_a_setting_of_another_type_is_named(settings: type, given: dict[str, Any], words: str) -> None:
    with pytest.raises(hpr.HprError, match=re.escape(words)):
        settings(**given)


def test_right_types_pass(made: tuple[Any, ...]) -> None:
    model, _, _, _ = made
    assert hpr.PlanOptions(operators=["low rank"]).operators == ("low rank",)  # type: ignore[arg-type]
    assert hpr.Recipe(learning_rate=1, checkpoints=Path("runs"), duration=3).learning_rate == 1
    rule = hpr.presets.cycle(1)
    assert hpr.share(model, rule) is not model
