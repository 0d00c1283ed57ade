"""Metrics, sizes and the summary: known answers, and sums that add up."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from torch import Tensor, nn

from conftest import HEADS, low_rank_terms, plan_everything, plan_of
from hpr.anatomy.describe import describe
from hpr.data.batches import Batches
from hpr.errors import HprError
from hpr.evaluation.cost import disk_bytes, file_bytes, flops_per_token, parts, resident_bytes, sizes
from hpr.evaluation.divergence import accuracy, compare, cosine, divergence, embeddings, neighbour_agreement
from hpr.evaluation.evaluate import evaluate, measured_on
from hpr.evaluation.latency import latency, peak_memory
from hpr.nn.bank import parameters
from hpr.plans.plan import Plan
from hpr.plans.terms import Term
from hpr.profiling.objectives import OBJECTIVES
from hpr.sharing.share import share

pytestmark = pytest.mark.usefixtures("random_fit")  # share fills in random factors
Build = Callable[..., nn.Module]


def token_batches(count: int = 3, examples: int = 4) -> Batches:
    generator = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(count):
        ids = torch.randint(3, 40, (examples, 7), generator=generator)
        mask = torch.ones_like(ids)
        mask[1, 4:] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return Batches(batches, torch.randperm(count * examples, generator=generator).tolist())


class Linear(nn.Module):
    """Rows (B, 6) → (B, classes)."""

    def __init__(self, classes: int = 4, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.layer = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def rows(n: int = 20, seed: int = 5) -> list[Tensor]:
    return list(torch.randn(n, 6, generator=torch.Generator().manual_seed(seed)).split(6))


def test_divergence_is_the_mean_kl_with_its_standard_error() -> None:
    student, teacher, batches = Linear(seed=1), Linear(), rows()
    found = divergence(student, teacher, batches, OBJECTIVES["classification"])
    with torch.no_grad():
        p, q = (F.log_softmax(model(torch.cat(batches)).double(), -1) for model in (teacher, student))
    each = (p.exp() * (p - q)).sum(-1)
    assert found.mean == pytest.approx(float(each.mean()), rel=1e-5)
    assert found.error == pytest.approx(float(each.std() / 20**0.5), rel=1e-5)
    assert divergence(teacher, teacher, batches, OBJECTIVES["classification"]).mean == 0
    assert divergence(student, teacher, [batches[0][:1]], OBJECTIVES["classification"]).error is None


def test_outputs_come_back_in_input_order(build: Build) -> None:
    model, batches = build("bert"), token_batches()
    found = embeddings(model, batches, OBJECTIVES["embedding"])
    flat = embeddings(model, list(batches), OBJECTIVES["embedding"])
    for row, place in enumerate(batches.order):
        assert torch.equal(found[place], flat[row])
    torch.testing.assert_close(found.norm(dim=-1), torch.ones(12))
    with pytest.raises(HprError, match="not one per example"):
        embeddings(model, batches, OBJECTIVES["hidden"])


def test_cosine_and_neighbours() -> None:
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    turned = x @ torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1))).Q
    assert cosine(x, 3 * x) == pytest.approx(1)
    assert cosine(x, -x) == pytest.approx(-1)
    assert neighbour_agreement(x, turned) == 1
    other = torch.randn(50, 5, generator=torch.Generator().manual_seed(2))
    near = []
    for one in (x, other):
        unit = F.normalize(one, dim=-1).numpy()
        order = np.argsort(-(unit @ unit.T - 2 * np.eye(50)), axis=1)
        near.append([set(row[:10]) for row in order])
    expected = np.mean([len(a & b) / 10 for a, b in zip(*near, strict=True)])
    assert neighbour_agreement(x, other) == pytest.approx(expected)
    assert neighbour_agreement(x[:4], other[:4]) == 1
    with pytest.raises(HprError, match="at least two"):
        neighbour_agreement(x[:1], other[:1])


def test_accuracy() -> None:
    logits = torch.eye(3)[[0, 1, 2, 2]]
    assert accuracy(logits, [0, 1, 2, 0]) == 0.75
    with pytest.raises(HprError, match="label 3 of example 1"):
        accuracy(logits, [0, 3, 1, 1])
    with pytest.raises(HprError, match="one for each example"):
        accuracy(logits, [0, 1])
    model, batches = Linear(), Batches(rows(12), torch.arange(12).flip(0).tolist())
    with torch.no_grad():
        labels = model(torch.cat(list(batches)).flip(0)).argmax(-1)
    assert accuracy(embeddings(model, batches, OBJECTIVES["classification"]), labels) == 1


def test_loss_and_agreement_of_a_language_model(build: Build) -> None:
    teacher, batches = build("llama", tf.AutoModelForCausalLM), token_batches()
    student = share(teacher, plan_everything(teacher))
    found = compare(student, teacher, batches, OBJECTIVES["causal-lm"])
    with torch.no_grad():
        labels = [b["input_ids"].masked_fill(b["attention_mask"] == 0, -100) for b in batches]
        own = [float(teacher(**batch, labels=label).loss) for batch, label in zip(batches, labels, strict=True)]
    assert found.teacher_loss == pytest.approx(sum(own) / 3, rel=1e-5)  # as many targets in each batch
    assert found.student_loss is not None
    assert found.student_loss > 0
    assert found.agreement is not None
    assert 0 <= found.agreement < 1
    assert found.cosine is None
    assert found.teacher is None
    assert compare(teacher, teacher, batches, OBJECTIVES["causal-lm"]).agreement == 1


def test_padding_does_not_count(build: Build) -> None:
    teacher, batches = build("gpt2", tf.AutoModelForCausalLM), token_batches()
    student = share(teacher, plan_everything(teacher))
    other = [dict(b, input_ids=b["input_ids"].masked_fill(b["attention_mask"] == 0, 9)) for b in batches]
    first, second = (compare(student, teacher, list(each), OBJECTIVES["causal-lm"]) for each in (batches, other))
    assert first.divergence.mean == pytest.approx(second.divergence.mean, rel=1e-5)
    assert first.student_loss == pytest.approx(second.student_loss, rel=1e-5)
    assert first.agreement == second.agreement


def test_what_cannot_be_compared_is_named() -> None:
    objective, batches = OBJECTIVES["classification"], rows()
    broken = Linear()
    broken.layer.weight.data[0, 0] = float("nan")
    poisoned = [batches[0], batches[1].clone().index_fill_(0, torch.tensor([2]), float("inf"))]
    for student, teacher, data, message in (
        (broken, Linear(), batches, "student's output is not finite on batch 0, example 0"),
        (Linear(), broken, batches, r"the weight layer\.weight is not finite at \[0, 0\]"),
        (Linear(), Linear(), poisoned, r"cannot read batch 1 .*not finite in example 2"),
        (Linear(), Linear(), [], "no batches"),
        (Linear(3), Linear(4), batches, r"shape \(6, 3\), the teacher's \(6, 4\)"),
    ):
        with pytest.raises(HprError, match=message):
            evaluate(student, teacher, data, objective)
    with pytest.raises(HprError, match="labels were given"):
        evaluate(Linear(), Linear(), batches, labels=[0] * 20)
    with pytest.raises(HprError, match="does not fit"):
        evaluate(Linear(), Linear(), batches, OBJECTIVES["embedding"])


def plans(model: nn.Module) -> list[Plan]:
    """Low rank with shared bases, and one with every kind of term."""
    anatomy = describe(model)
    table = next(site for site in anatomy.sites if site.kind == "embedding")
    linear = [site for site in anatomy.sites if site.stack is not None and site.kind == "linear"]
    same = [site for site in linear if (site.out_features, site.in_features) == (linear[0].out_features, linear[0].in_features)]
    changed = {
        same[0].name: (Term("whole", row_scale="r0", column_scale="c"),),
        same[1].name: (Term("whole", row_scale="r1", column_scale="c"), *low_rank_terms("delta", 2)),
        same[2].name: low_rank_terms("identity", 3, identity="u"),
        table.name: (
            Term("head:u", "shared:v", 4, rows=(0, 10)),
            Term("tail:u", "shared:v", 4, rows=(10, table.out_features)),
        ),
    }
    return [plan_everything(model), plan_of(anatomy, changed)]


@pytest.mark.parametrize("family", HEADS)
def test_sizes_are_those_of_the_plan_and_of_the_file(build: Build, tmp_path: Path, family: str) -> None:
    teacher = build(family, HEADS[family])
    anatomy = describe(teacher)
    for number, plan in enumerate([None, *plans(teacher)]):
        student = teacher if plan is None else share(teacher, plan)
        assert parameters(student) == (anatomy.total_parameters if plan is None else plan.parameters(anatomy))
        found = parts(teacher, student, anatomy)
        assert sum(part["before"] for part in found) == anatomy.total_parameters
        assert sum(part["after"] for part in found) == parameters(student)
        assert all(isinstance(part["after"], int) for part in found)
        assert found[-1]["name"] == "biases, norms and other"
        assert found[-1]["before"] == found[-1]["after"] == anatomy.other_parameters
        student.save_pretrained(tmp_path / str(number))
        assert disk_bytes(student) == file_bytes(tmp_path / str(number))
        assert resident_bytes(student) >= 4 * parameters(student)
        assert set(sizes(student, anatomy)) == {"parameters", "bytes", "resident_bytes", "flops_per_token"}
    with pytest.raises(HprError, match=r"no \.safetensors"):
        file_bytes(tmp_path)


def test_plain_and_half_precision_files(build: Build, tmp_path: Path) -> None:
    from safetensors.torch import save_model

    plain = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 9))
    for tied in (False, True):
        if tied:
            plain[1].weight = plain[0].weight
        save_model(plain, str(tmp_path / "model.safetensors"))
        assert disk_bytes(plain) == file_bytes(tmp_path)
    half = build("bert").half()
    half.register_buffer("counts", torch.zeros(3, dtype=torch.int64))
    half.save_pretrained(tmp_path / "half")
    assert disk_bytes(half) == file_bytes(tmp_path / "half")


def test_shared_factors_are_split_among_their_users(build: Build) -> None:
    teacher = build("bert")
    anatomy = describe(teacher)
    tied = {f"encoder.layer.{i}.attention.self.query": (Term("q"),) for i in range(3)}
    student = share(teacher, plan_of(anatomy, tied))
    found = {part["name"]: part for part in parts(teacher, student, anatomy)}
    assert found["encoder · attention.self.query"] == {"name": "encoder · attention.self.query", "before": 768, "after": 256}
    assert found["embeddings.word_embeddings"]["after"] == 640
    gone = copy.deepcopy(teacher)
    del gone.encoder.layer[2]
    after = {part["name"]: part["after"] for part in parts(teacher, gone, anatomy)}
    assert after["encoder · attention.self.query"] == 512
    assert sum(after.values()) == parameters(gone)
    assert flops_per_token(teacher, anatomy) - flops_per_token(gone, anatomy) == 2 * (4 * 256 + 2 * 512)


def test_flops(build: Build) -> None:
    teacher = build("gpt2", tf.AutoModelForCausalLM)
    anatomy = describe(teacher)
    blocks = 3 * (16 * 48 + 16 * 16 + 2 * 16 * 64)
    assert flops_per_token(teacher, anatomy) == 2 * (blocks + 40 * 16)  # the tied head multiplies, the table only looks up
    changed = {
        "wte": low_rank_terms("w", 4),
        "h.0.mlp.c_fc": low_rank_terms("f", 2),
        "h.1.attn.c_proj": (Term("tie"),),
        "h.2.attn.c_proj": (Term("tie"),),
    }
    student = share(teacher, plan_of(anatomy, changed))
    saved = 16 * 64 - 2 * (16 + 64) + 40 * 16 - 4 * (40 + 16) - 4 * 16  # tying saves none; the lookup now multiplies by v
    assert flops_per_token(teacher, anatomy) - flops_per_token(student, anatomy) == 2 * saved


def test_latency_and_memory() -> None:
    small, large = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 4000), nn.Linear(4000, 8))
    x = torch.zeros(100, 8)
    found = latency(small, large, x, repeats=5)
    assert found.student_ms > 0
    assert found.ratio < 1
    assert peak_memory(small, x) == 4 * (8 * 8 + 8 + 100 * 8)
    weights = sum(parameter.numel() for parameter in large.parameters())
    assert peak_memory(large, x) == 4 * (weights + 100 * 4000 + 100 * 8)
    assert peak_memory(large, x) == peak_memory(large, x)
    with pytest.raises(HprError, match="at least 1"):
        latency(small, large, x, repeats=0)


def test_evaluate_is_json_and_what_the_report_reads(build: Build) -> None:
    from hpr.reporting.report import render_report

    teacher, batches = build("bert"), token_batches()
    plan = plan_everything(teacher)
    student = share(teacher, plan).train()
    found = evaluate(student, teacher, batches, OBJECTIVES["embedding"], repeats=1)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    rows = {row["name"]: row for row in found["quality"]}
    assert rows["Divergence from the original"]["after"] > 0
    assert rows["Divergence from the original"]["standard_error"] > 0
    assert -1 < rows["Cosine to the original"]["after"] < 1
    assert rows["Cosine to the original"]["data"] == "12 examples"
    keys = {"parameters", "bytes", "resident_bytes", "flops_per_token", "latency_ms", "peak_memory_bytes"}
    assert set(found["sizes"]["before"]) == set(found["sizes"]["after"]) == keys
    assert found["sizes"]["after"]["parameters"] == plan.parameters(describe(teacher))
    assert found["sizes"]["after"]["peak_memory_bytes"] > found["sizes"]["after"]["resident_bytes"]
    assert student.training
    assert not teacher.training
    assert "Divergence from the original" in render_report(plan.to_dict(), found)
    same = measured_on(evaluate(teacher, teacher, batches, OBJECTIVES["embedding"], repeats=0), "noise")
    assert [row["after"] for row in same["quality"]] == pytest.approx([0, 1, 1])
    assert same["quality"][0]["data"] == "noise"
    assert same["sizes"]["before"] == same["sizes"]["after"]
    assert same["sizes"]["after"]["latency_ms"] is None


@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_evaluate_finds_the_objective(build: Build, family: str) -> None:
    teacher, batches = build(family, HEADS[family]), token_batches(1)
    if family == "t5":
        batches[0]["labels"] = batches[0]["input_ids"].clone()
    student = share(teacher, plan_everything(teacher))
    names = [row["name"] for row in evaluate(student, teacher, batches, repeats=0)["quality"]]
    expected = ["Divergence from the original", "Same first choice as the original"]
    assert names == (expected if family == "bert" else ["Loss", *expected])


def test_labels_give_accuracy() -> None:
    teacher, student = Linear(), Linear(seed=1)
    batches = Batches([{"x": batch} for batch in rows()], torch.arange(20).flip(0).tolist())
    with torch.no_grad():
        labels = teacher(torch.cat(rows())).argmax(-1).flip(0)
    found = evaluate(student, teacher, batches, OBJECTIVES["classification"], labels=labels, repeats=0)["quality"][0]
    assert (found["name"], found["before"]) == ("Accuracy", 1)
    assert found["after"] < 1


def test_minilm(minilm: Path) -> None:
    model = tf.AutoModel.from_pretrained(minilm)
    anatomy = describe(model)
    assert parameters(model) == anatomy.total_parameters == 22_713_216
    assert disk_bytes(model) == pytest.approx(4 * 22_713_216, rel=1e-3)
    assert flops_per_token(model, anatomy) == 2 * (6 * (4 * 384**2 + 2 * 384 * 1536) + 384**2)
