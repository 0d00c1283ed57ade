"""The pipeline: how data is split, what a profile says about itself, and compress on a module with its tokenizer."""

import math
import random
from dataclasses import replace

import pytest
import torch
import transformers as tf

import hpr
from hpr.anatomy.describe import describe
from hpr.data import splits
from hpr.data.loaded_model import LoadedModel
from hpr.data.splits import EVALUATED, RESCORED, Splits
from hpr.pipeline.compress import Compression
from hpr.pipeline.rescore import rescore
from hpr.planning import planner
from hpr.plans.plan import keep_all
from hpr.plans.terms import routers_of
from hpr.profiling.objectives import OBJECTIVES
from hpr.profiling.run import profile
from hpr.runtime.progress import reporting_to

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(35))]
DRAW = random.Random(0)
TEXTS = [f"word{n // 30} word{n % 30} " + " ".join(DRAW.choices(WORDS[5:], k=DRAW.randint(2, 6))) for n in range(64)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "vocab.txt"
    path.write_text("\n".join(WORDS), encoding="utf-8")
    return tf.BertTokenizer(str(path), model_max_length=24)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 32, "vocab_size": 40}
    return tf.BertModel(tf.BertConfig(**sizes, num_attention_heads=2, max_position_embeddings=24)).eval()


def prepare(data, tokenizer, examples: int) -> Splits:
    return splits.prepare(data, LoadedModel(torch.nn.Identity(), tokenizer, "embedding", None, "a model"), examples)


def rows(batches) -> list[tuple[int, ...]]:
    return [
        tuple(ids[mask == 1].tolist())
        for batch in batches
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


@pytest.mark.parametrize("count", [8, 9, 12, 64])
def test_the_three_splits_are_disjoint_and_use_every_text(tokenizer, count: int) -> None:
    texts = prepare(TEXTS[:count], tokenizer, 4096)
    parts = [set(rows(part)) for part in (texts.calibration, texts.rescoring, texts.heldout)]
    assert all(parts)
    assert sum(map(len, parts)) == len(set.union(*parts)) == count
    assert texts.own
    assert texts.source == "the texts given"


def test_examples_limit_the_calibration_alone(tokenizer) -> None:
    texts = prepare(TEXTS, tokenizer, 10)
    assert len(rows(texts.calibration)) == 10
    assert len(rows(texts.rescoring)) == len(rows(texts.heldout)) == 8


@pytest.mark.parametrize("examples", [2, 100])
def test_docstrings_stand_in_for_texts(tokenizer, examples: int, monkeypatch) -> None:
    monkeypatch.setattr(splits, "docstrings", lambda split: [f"{text} {split}" for text in TEXTS * 3])
    texts = prepare(None, tokenizer, examples)
    assert not texts.own
    assert len(rows(texts.calibration)) == examples
    assert 0 < len(rows(texts.rescoring)) <= RESCORED
    assert 0 < len(rows(texts.heldout)) <= min(EVALUATED, examples)


def test_data_from_a_file(tokenizer, tmp_path) -> None:
    path = tmp_path / "texts.txt"
    path.write_text("\n".join(TEXTS[:20]), encoding="utf-8")
    texts = prepare(str(path), tokenizer, 100)
    assert texts.source == "texts.txt"
    assert rows(texts.calibration) == rows(prepare(TEXTS[:20], tokenizer, 100).calibration)


def test_data_that_does_not_serve(tokenizer) -> None:
    for texts in (TEXTS[:7], []):
        with pytest.raises(hpr.HprError, match=f"{len(texts)} examples are too few.*at least 8"):
            prepare(texts, tokenizer, 100)
    with pytest.raises(hpr.HprError, match="at least 2"):
        prepare(TEXTS, tokenizer, 1)
    with pytest.raises(hpr.HprError, match="no tokenizer"):
        prepare(TEXTS, None, 100)


def test_a_profile_says_what_it_was_made_of(model, tokenizer) -> None:
    texts = prepare(TEXTS, tokenizer, 100)
    found = profile(model, texts.calibration, "embedding", seed=3)
    assert found.fingerprint == describe(model).fingerprint
    assert found.about["objective"] == "embedding"
    assert found.about["seed"] == 3
    assert found.about["examples"] == 48
    assert found.about["tokens"] == sum(map(len, rows(texts.calibration)))
    assert found.about["peak_memory_bytes"] > 0
    assert {"hpr", "torch", "transformers", "python"} == set(found.about["versions"])
    assert profile(model, texts.calibration).about["objective"] == "hidden"
    with pytest.raises(hpr.HprError, match="no objective"):
        profile(model, texts.calibration, "accuracy")


def test_rescoring_measures_every_plan(model, tokenizer) -> None:
    texts = prepare(TEXTS, tokenizer, 100)
    found = profile(model, texts.calibration, "embedding")
    draft = planner.draft(model, found)
    plans = [keep_all(draft.anatomy), *(draft.best(draft.budget(text)) for text in ("70%", "30%"))]
    scores = rescore(model, found, plans, texts.rescoring, OBJECTIVES["embedding"])
    assert scores[0].divergence.mean == pytest.approx(0, abs=1e-6)
    assert scores[0].divergence.mean < scores[1].divergence.mean < scores[2].divergence.mean


def test_compress_with_routers(model, tokenizer) -> None:
    data = {"first": TEXTS, "second": [text.upper() for text in TEXTS]}
    loaded = hpr.open_model(model, tokenizer=tokenizer, objective="embedding")
    options = hpr.PlanOptions(plans=1)
    result = hpr.compress(loaded, "60%", data, options=replace(options, routers=2), heal="4steps")
    assert routers_of(term for entry in result.plan.entries.values() for term in entry.terms)
    assert result.metrics["routes"]["experts"] == 2
    assert all(set(own) == {"first", "second"} for own in result.metrics["routes"]["shares"].values())
    assert all("entropy" in row for row in result.metrics["healing"]["history"])
    assert "routes" not in hpr.compress(loaded, "60%", TEXTS, options=options).metrics
    with pytest.raises(hpr.HprError, match=r"routers is 1.*give 2 or more"):
        hpr.PlanOptions(routers=1)
    with pytest.raises(hpr.HprError, match="Set one of them"):
        hpr.PlanOptions(routers=2, reuse=True)


def test_compress_a_module_without_writing(model, tokenizer) -> None:
    before = {key: value.clone() for key, value in model.state_dict().items()}
    stages = []
    with reporting_to(lambda stage, done, total: stages.append((stage, done <= total))):
        loaded = hpr.open_model(model, tokenizer=tokenizer, objective="embedding")
        result = hpr.compress(loaded, "60%", TEXTS, options=hpr.PlanOptions(plans=2, curve=True))
    assert isinstance(result, Compression)
    assert result.output is None
    assert isinstance(result.student, tf.BertModel)
    anatomy = describe(model)
    used = sum(parameter.numel() for parameter in result.student.parameters())
    used += sum(buffer.numel() for name, buffer in result.student.named_buffers() if name.endswith(".order"))
    assert used == result.plan.parameters(anatomy) <= 0.6 * anatomy.total_parameters
    metrics = result.metrics
    assert {"format", "model", "budget", "plans", "refit", "operator_gains", "timing", "calibration", "layers"} <= set(metrics)
    assert sum(one["chosen"] for one in metrics["plans"]) == 1
    chosen = next(one for one in metrics["plans"] if one["chosen"])
    rivals = [one for one in metrics["plans"] if one["budget"] == "60%"]
    assert chosen["measured"] == min(one["measured"] for one in rivals)
    assert chosen["parameters"] == used
    assert all(math.isfinite(one["measured"]) and one["measured"] >= 0 for one in metrics["plans"])
    assert {"data", "profile", "plan", "rescore", "evaluate"} <= set(metrics["timing"])
    assert metrics["calibration"]["examples"] == 48
    assert all(gain["damage_without"] >= gain["damage_with"] * (1 - 1e-9) for gain in metrics["operator_gains"])
    assert all(fits for _, fits in stages)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in before.items())


def test_compress_says_what_is_wrong_before_it_starts(model, tokenizer) -> None:
    def never(*_: object) -> None:
        raise AssertionError("it has started")

    def tried(budget="60%", data=TEXTS, tokenizer=tokenizer, objective=None, **options) -> None:
        loaded = hpr.open_model(model, tokenizer=tokenizer, objective=objective)
        hpr.compress(loaded, budget, data, options=hpr.PlanOptions(**options))

    for wrong, message in (
        ({"budget": "half"}, "is no budget"),
        ({"operators": ("svd",)}, "no operator 'svd'"),
        ({"objective": "accuracy"}, "no objective"),
        ({"data": ["one"]}, "too few"),
        ({"only": "decoder.*"}, "matches no site"),
        ({"tokenizer": None}, "no tokenizer"),
    ):
        with pytest.raises(hpr.HprError, match=message), reporting_to(never):
            tried(**wrong)
