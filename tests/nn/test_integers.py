import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hpr
from conftest import HEADS
from hpr.anatomy.describe import describe
from hpr.coding.codes import Codes, Product
from hpr.evaluation.cost import parts, resident_bytes, sizes
from hpr.nn.bank import parameters
from hpr.nn.coded import codes_of
from hpr.nn.integers import Integers, keep_integers
from hpr.plans.terms import Entry, Term


def inputs(family: str, ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if family in ("bart", "t5") else {})


@pytest.fixture(params=["whole", "products"])
def coded(request: pytest.FixtureRequest, build: Callable[..., nn.Module], ids: Tensor) -> Callable[[str], nn.Module]:
    """A coded model with a head. Either codes of its table lie outside int8, or the table and others are products."""

    def make(family: str) -> nn.Module:
        model = build(family, HEADS[family])
        with torch.no_grad():
            model.get_input_embeddings().weight[5, 3] = 30
        profile = hpr.profile(model, [inputs(family, ids)])
        plan = hpr.plan(model, profile, "60%bytes" if request.param == "whole" else "30%bytes")
        if request.param == "products":
            sites = [site for site in describe(model).sites if profile.sites[site.name].has_gradient]
            thin = [next(site for site in sites if site.kind == kind) for kind in ("embedding", "linear")]
            terms = {site.name: Term(f"{site.name}.u", f"{site.name}.v", 3) for site in thin}
            entries = {name: Entry("low rank", (term,)) for name, term in terms.items()}
            plan = replace(plan, entries={**plan.entries, **entries})
        made = hpr.share(model, plan, profile)
        assert any(isinstance(one.codes(), Product) for one in codes_of(made).values()) == (request.param == "products")
        return made

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", HEADS)
def test_outputs_are_those_of_the_float_model_bit_for_bit(
    family: str, dtype: torch.dtype, coded: Callable[[str], nn.Module], ids: Tensor
) -> None:
    student = coded(family)
    kept = keep_integers(copy.deepcopy(student)).to(dtype)
    assert not {name for name, _ in kept.named_parameters()} & {f"{site.name}.weight" for site in describe(student).sites}
    with torch.no_grad():
        expected, found = (model.to(dtype)(**inputs(family, ids)).logits for model in (student, kept))
    assert torch.equal(found, expected)
    assert found.dtype == dtype
    again = keep_integers(kept)  # nothing is left to do
    with torch.no_grad():
        assert torch.equal(again(**inputs(family, ids)).logits, expected)


@pytest.mark.parametrize("family", HEADS)
def test_a_save_writes_the_same_file_and_a_plain_save_a_stock_checkpoint(
    family: str, coded: Callable[[str], nn.Module], ids: Tensor, tmp_path: Path
) -> None:
    student = coded(family)
    kept = keep_integers(copy.deepcopy(student))
    files = [hpr.save(model, tmp_path / name) / "model.safetensors" for model, name in ((student, "float"), (kept, "kept"))]
    assert files[0].read_bytes() == files[1].read_bytes()
    kept.save_pretrained(tmp_path / "stock")
    loaded = keep_integers(HEADS[family].from_pretrained(tmp_path / "kept"))
    with torch.no_grad():
        expected = student(**inputs(family, ids)).logits
        assert torch.equal(HEADS[family].from_pretrained(tmp_path / "stock")(**inputs(family, ids)).logits, expected)
        assert torch.equal(loaded(**inputs(family, ids)).logits, expected)


def test_copies_pickles_and_unshared_models_compute_the_same(coded: Callable[[str], nn.Module], ids: Tensor) -> None:
    student = coded("bart")
    kept = keep_integers(copy.deepcopy(student))
    copied, dense = copy.deepcopy(kept), hpr.unshare(kept)
    tables = {id(copied.get_input_embeddings().integers), id(copied.get_output_embeddings().integers)}
    assert len(tables) == 1
    assert dense.get_input_embeddings().weight is dense.get_output_embeddings().weight
    assert {type(module) for module in dense.modules()} == {type(module) for module in student.modules()}
    with torch.no_grad():
        expected = student(ids, decoder_input_ids=ids).logits
        for model in (copied, dense, pickle.loads(pickle.dumps(kept))):
            assert torch.equal(model(ids, decoder_input_ids=ids).logits, expected)


def test_sizes_say_what_integers_would_take_and_count_the_same_parameters(coded: Callable[[str], nn.Module]) -> None:
    student = coded("bert")
    kept, anatomy = keep_integers(copy.deepcopy(student)), describe(student)
    assert sizes(student, anatomy)["integer_bytes"] == resident_bytes(kept) < 0.7 * resident_bytes(student)
    assert sizes(kept, anatomy)["integer_bytes"] == resident_bytes(kept)
    assert parameters(kept) == parameters(student)
    assert parts(student, kept, anatomy) == parts(student, student, anatomy)


def test_a_model_without_codes_is_refused(bert: nn.Module) -> None:
    with pytest.raises(hpr.HprError, match="budget in bytes"):
        keep_integers(bert)


@pytest.mark.parametrize(("largest", "share", "dtype"), [(100, 1.0, torch.int8), (10_000, 0.01, torch.int8)])
@pytest.mark.parametrize("float_type", [torch.float32, torch.float16])
def test_codes_outside_the_range_are_kept_exactly(
    largest: int, share: float, dtype: torch.dtype, float_type: torch.dtype
) -> None:
    draw = np.random.default_rng(0)
    values = draw.integers(-100, 101, (40, 30)).astype(np.int32)
    values[draw.random(values.shape) < share] = largest
    codes = Codes(values, draw.integers(-9, 9, 40).astype(np.int32), draw.integers(-9, 9, 30).astype(np.int32), 3e-4)
    integers = Integers(codes, torch.empty(0, dtype=float_type))
    assert integers.codes.dtype == dtype
    weight = codes.weight().to(float_type)
    assert torch.equal(integers.weight(), weight)
    ids = torch.from_numpy(draw.integers(0, 40, (3, 50)))
    assert torch.equal(integers.look_up(ids), nn.functional.embedding(ids, weight))
    assert integers.look_up(ids[:0]).shape == (0, 50, 30)
    with pytest.raises((IndexError, RuntimeError)):
        integers.look_up(torch.tensor([40]))


def test_a_weight_with_many_large_codes_takes_a_wider_type() -> None:
    zeros = np.zeros(8, np.int32)
    codes = Codes(np.arange(64, dtype=np.int32).reshape(8, 8) * 400, zeros, zeros, 1.0)
    integers = Integers(codes, torch.empty(0))
    assert integers.codes.dtype == torch.int16
    assert torch.equal(integers.weight(), codes.weight())
