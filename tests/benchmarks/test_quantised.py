"""Peers at a number of bytes: rounding, packing and what their rows say, on small matrices and tiny random models."""

import itertools
import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import ablations
import bytes_picture
import hpr
from common.byte_ground import Ground, marked
from common.paths import shared
from common.quantised.packing import ans_bytes, zstd_bytes
from common.quantised.static import static
from common.quantised.student import half_bytes, weights_of, with_weights
from common.quantised.uniform import DAMPING, GROUP, gptq, input_moments, nearest, table_moments, uniform
from common.texts import divided
from hpr.anatomy.describe import describe
from hpr.anatomy.lookup import module_at
from hpr.coding.codes import Codes, Product
from hpr.data.batches import Batches
from hpr.evaluation.divergence import divergence
from hpr.nn.coded import codes_of
from hpr.profiling.objectives import OBJECTIVES


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(12, 2 * GROUP, generator=torch.Generator().manual_seed(0)).double()


@pytest.fixture
def moment() -> torch.Tensor:
    """Of inputs that are strongly correlated."""
    mixed = (
        torch.randn(400, 5, generator=torch.Generator().manual_seed(1)).double()
        @ torch.randn(5, 2 * GROUP, generator=torch.Generator().manual_seed(2)).double()
        + 0.3 * torch.randn(400, 2 * GROUP, generator=torch.Generator().manual_seed(3)).double()
    )
    return mixed.T @ mixed / 400


@pytest.fixture
def on(build) -> Ground:
    """A tiny encoder with its profile."""
    model = build("bert")
    ids = torch.randint(3, 40, (32, 12), generator=torch.Generator().manual_seed(2))
    batches = Batches([{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(8)], range(32))
    goal = OBJECTIVES["embedding"]
    profile = hpr.profile(model, batches, "embedding")

    def score(student: nn.Module) -> dict[str, float]:
        return {"divergence": divergence(student, model, batches, goal).mean}

    return Ground(model, batches, goal, profile, score, (0.02,), (8, 4))


def damage(found: torch.Tensor, weight: torch.Tensor, moment: torch.Tensor) -> float:
    error = found.double() - weight.double()
    return float(((error @ moment) * error).sum())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_beats_nearest_on_correlated_inputs(weight, moment, bits):
    plain, fitted = nearest(weight, bits), gptq(weight, moment, bits)
    assert int(fitted.codes.max()) == int(plain.codes.max()) == 2**bits - 1
    assert damage(fitted.weight(), weight, moment) < 0.7 * damage(plain.weight(), weight, moment)


def test_gptq_is_nearest_if_inputs_are_independent(weight):
    assert torch.equal(gptq(weight, torch.eye(2 * GROUP), 4).weight(), nearest(weight, 4).weight())


def test_gptq_lets_each_column_be_followed_by_the_best_answer(weight, moment):
    """The remaining columns move to the least damage, solved anew after every column."""
    plain = nearest(weight, 4)
    low, step = (part.repeat_interleave(GROUP, 1) for part in (plain.low, plain.step))
    damped = moment + DAMPING * float(moment.diagonal().mean()) * torch.eye(2 * GROUP).double()
    rest, expected = weight.clone(), torch.empty_like(weight)
    for j in range(2 * GROUP):
        expected[:, j] = ((rest[:, j] - low[:, j]) / step[:, j]).round().clamp(0, 15)
        error = expected[:, j] * step[:, j] + low[:, j] - rest[:, j]
        if j + 1 < 2 * GROUP:
            rest[:, j + 1 :] -= error[:, None] * torch.linalg.solve(damped[j + 1 :, j + 1 :], damped[j + 1 :, j])
    found = gptq(weight, moment, 4, (plain.low, plain.step))
    assert torch.equal(found.codes.double(), expected)


def test_gptq_is_that_of_a_published_implementation(weight, moment):
    published = pytest.importorskip("llmcompressor.modifiers.gptq.gptq_quantize")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    parts = weight.float().reshape(12, -1, GROUP)
    step = (parts.amax(2).clamp(min=0) - parts.amin(2).clamp(max=0)) / 15
    zero = (-parts.amin(2).clamp(max=0) / step).round()
    settings = quantization.QuantizationArgs(num_bits=4, symmetric=False, strategy="group", group_size=GROUP, actorder=None)
    theirs, _, _ = published.quantize_weight(
        weight.float()[None].clone(),
        moment.float()[None].clone(),
        step[None],
        (zero - 8)[None],
        None,
        settings,
        percdamp=DAMPING,
    )
    ours = gptq(weight, moment, 4, (-zero * step, step)).weight()
    apart = (ours - theirs[0]).abs() > step.repeat_interleave(GROUP, 1) / 2
    assert float(apart.double().mean()) < 0.01  # they compute in float32, so a tie may fall to the other side
    assert damage(ours, weight, moment) == pytest.approx(damage(theirs[0], weight, moment), rel=0.02)


def test_packed_codes_take_their_entropy():
    codes = np.random.default_rng(0).binomial(15, 0.5, (200, 300)).astype(np.uint8)
    shares = np.bincount(codes.ravel()) / codes.size
    entropy = -(shares[shares > 0] * np.log2(shares[shares > 0])).sum() * codes.size / 8
    assert entropy < ans_bytes(codes) < entropy * 1.01 + 64
    assert entropy < zstd_bytes(codes, 4) < codes.size / 2
    assert ans_bytes(np.zeros((4, 4), np.uint8)) < 16


def test_bytes_are_those_of_codes_scales_and_other_numbers(on):
    made = uniform(on.model, 4)
    groups = sum(weight.shape[0] * math.ceil(weight.shape[1] / GROUP) for weight in weights_of(on.model).values())
    numbers = sum(weight.numel() for weight in weights_of(on.model).values())
    other = sum(parameter.numel() for parameter in on.model.parameters()) - numbers
    assert made.bytes["fixed"] == numbers // 2 + 4 * groups + 2 * other
    assert half_bytes(on.model, weights_of(on.model)) == 2 * other


def test_a_peer_changes_weights_and_keeps_other_numbers_in_half_precision(on):
    name = describe(on.model).sites[-1].name
    student = with_weights(on.model, {name: torch.ones_like(weights_of(on.model)[name])})
    assert torch.equal(module_at(student, name).weight, torch.ones_like(module_at(student, name).weight))
    for before, after in zip(on.model.parameters(), student.parameters(), strict=True):
        assert after is module_at(student, name).weight or torch.equal(after, before.half().float())
    assert on.score(uniform(on.model, 8).student)["divergence"] < on.score(uniform(on.model, 4).student)["divergence"]


def test_gptq_rounds_tables_to_nearest_unless_told(on):
    table = "embeddings.word_embeddings"
    inputs = input_moments(on.model, on.choosing)
    moments = ({}, inputs, {**inputs, **table_moments(on.profile)})
    plain, kept, changed = (weights_of(uniform(on.model, 3, given).student) for given in moments)
    assert torch.equal(plain[table], kept[table])
    assert not torch.equal(plain[table], changed[table])
    query = "encoder.layer.1.attention.self.query"
    assert not torch.equal(plain[query], kept[query])


def test_a_static_table_recovers_what_is_static():
    torch.manual_seed(0)
    outputs = torch.randn(30, 6)
    shares = torch.full((30,), 1 / 30)
    ids = torch.randint(0, 30, (64, 5))
    mask = torch.ones_like(ids)
    mask[::2, 3:] = 0
    wanted = (outputs[ids] * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    made = static(outputs, shares, 6, ([{"input_ids": ids, "attention_mask": mask}], wanted))
    hidden = made.student(input_ids=ids, attention_mask=mask).last_hidden_state
    found = (hidden * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
    assert torch.allclose(found, wanted, atol=0.05)
    assert made.bytes["fixed"] == 30 * 6 + 2 * 6 + 2 * 7 * 6


def test_a_row_is_lost_to_a_peer_of_no_more_bytes():
    rows = [
        {"method": "ours", "megabytes": 2.0, "divergence": 0.2, "six kinds": 0.1},
        {"method": "ours", "megabytes": 1.0, "divergence": 0.2, "six kinds": 0.1},
        {"method": "original", "megabytes": 1.0, "divergence": 0.0, "six kinds": 0.0},
        {"method": "peer", "megabytes": 2.0, "divergence": 0.15, "six kinds": 0.1},
    ]
    first, second, *_ = marked(rows)
    assert first["lost"] == "divergence: lost to peer (2.00 MB, 0.15000)"
    assert "lost" not in second


def test_the_picture_draws_every_method_once_and_ours_on_top(tmp_path, monkeypatch):
    rows = [
        {"method": name, "megabytes": size, "six kinds": nats}
        for name in ("ours", "GPTQ", "nobody")
        for size, nats in ((2.0, 0.1), (8.0, 0.001))
    ] + [{"method": "original", "megabytes": 90.0, "six kinds": 0.0}]
    source, target = tmp_path / "rows.jsonl", tmp_path / "bytes.svg"
    source.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["bytes_picture.py", str(source), str(target)])
    bytes_picture.main()
    drawn = target.read_text(encoding="utf-8")
    assert drawn.count("<circle") == 2 * 3  # two points and a key for each of two methods
    assert drawn.count(">HPR<") == drawn.count(">GPTQ<") == 1
    assert bytes_picture.points_of(rows, "six kinds").keys() == {"ours", "GPTQ"}


def test_sentences_to_measure_on_are_not_calibrated_on():
    try:
        shared()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    texts, held = divided(100)
    assert len(held) == 6
    assert all(len(several) == 100 for several in held.values())
    assert len(texts) == 6000
    assert not set(texts) & {text for several in held.values() for text in several}


def test_every_decision_gives_another_student_within_the_bytes(on, monkeypatch):
    limit = 12_000
    calls = itertools.count(1)  # what is tried later measures better, so other dampings than the first are chosen
    monkeypatch.setattr(Ground, "measure", lambda self, student: 1 / next(calls))
    first, _ = ablations.whole(on, limit)
    for name, decide in ablations.DECISIONS.items():
        student, size = decide(on, limit)
        assert size <= limit * 1.01, name
        same = all(torch.equal(one, other) for one, other in zip(student.parameters(), first.parameters(), strict=True))
        assert same == (name in ("nothing left out", "no products")), name  # random weights are no products
        assert codes_of(student)


def test_without_products_a_weight_of_rank_one_stays_whole(on):
    thin = on.model.encoder.layer[1].intermediate.dense.weight
    with torch.no_grad():
        thin.copy_(thin[:, :1] @ thin[:1])
    on = replace(on, profile=hpr.profile(on.model, on.choosing, "embedding"))
    kinds = [
        {type(coded.codes()) for coded in codes_of(decide(on, 12_000)[0]).values()}
        for decide in (ablations.whole, ablations.no_products)
    ]
    assert kinds == [{Codes, Product}, {Codes}]


def test_one_table_for_all_takes_more_bytes_than_one_for_each():
    generator = np.random.default_rng(0)
    flat = np.zeros(64, "int32")
    codes = [Codes(generator.normal(0, size, (64, 64)).round().astype("int32"), flat, flat, 1.0) for size in (1, 40)]
    assert ablations.table_each(codes) < ablations.table_for_all(codes)


def test_a_patch_ends_with_its_block(on):
    before = hpr.rounding.model.THRESHOLD
    with ablations.patched(hpr.rounding.model, "THRESHOLD", 0.5):
        assert hpr.rounding.model.THRESHOLD == 0.5
    assert before == hpr.rounding.model.THRESHOLD
    with pytest.raises(AttributeError):
        ablations.patched(hpr.rounding.model, "NO_SUCH_NAME", 1).__enter__()


def test_same_bits_are_nearly_the_same_in_every_weight(on):
    def spread(student: nn.Module) -> float:
        read = [
            site for site in describe(on.model).sites if on.profile.sites[site.name].has_gradient and site.parameters >= 256
        ]
        bits = [8 * len(codes_of(student)[site.name].stream) / site.parameters for site in read]
        return max(bits) - min(bits)

    assert spread(ablations.same_bits(on, 24_000)[0]) < 0.7 * spread(ablations.whole(on, 24_000)[0])


def test_moments_are_those_of_the_inputs_without_padding(on):
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    ids = torch.tensor([[5, 6, 7], [8, 0, 0]])
    read = []
    name = "encoder.layer.1.output.dense"
    hook = module_at(on.model, name).register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].detach()))
    found = input_moments(on.model, [{"input_ids": ids, "attention_mask": mask}])
    hook.remove()
    rows = read[0][mask.bool()].double()
    assert torch.allclose(found[name], rows.T @ rows / 4)
