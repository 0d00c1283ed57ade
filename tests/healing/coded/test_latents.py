"""Latents: whole codes, the bits that a decoder computes, straight-through gradients, one latent for tied weights."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import hpr
from conftest import HEADS
from hpr.coding.codes import Product, part_names, parts_of
from hpr.healing.coded.latents import Latents
from hpr.nn.coded import codes_of
from hpr.rounding.matrices import Rule


def inputs(family: str, ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if family in ("bart", "t5") else {})


def coded(model: nn.Module, batch: dict[str, Tensor]) -> nn.Module:
    profile = hpr.profile(model, [batch], structure=False)
    return hpr.share(model, hpr.plan(model, profile, "30%bytes"), profile)


def latents_of(student: nn.Module) -> Latents:
    return Latents(student, {site: one.codes() for site, one in codes_of(student).items()})


@pytest.mark.parametrize("family", HEADS)
def test_every_weight_that_is_read_gets_a_gradient_and_moved_latents_are_whole_codes_again(
    family: str, build: Callable[..., nn.Module], ids: Tensor
) -> None:
    student = coded(build(family, HEADS[family]), inputs(family, ids))
    latents = latents_of(student)
    codes = {site: one.codes() for site, one in codes_of(student).items()}
    parts = {name: site for site, one in codes.items() for name in part_names(site, one)}
    assert set(dict(latents.items())) == set(parts)
    student(**inputs(family, ids)).logits.square().sum().backward()
    for site, latent in latents.items():
        gradient = latent.gradient()
        assert gradient is not None, site
        assert gradient.abs().max() > 0, site
        assert gradient.shape == latent.value.shape
        latent.value.data += 0.8 * torch.rand_like(latent.value)
    latents.write()
    for site, codes in latents.whole().items():
        assert all(part.values.dtype.name == "int32" for part in parts_of(codes))
        expected, latent = codes.weight(), latents[part_names(site, codes)[0]]
        found = student.get_parameter(next(name for name, one in student.named_parameters() if one is latent.weight))
        assert torch.equal(found if found.shape == expected.shape and not _transposed(latent.module) else found.T, expected)


def _transposed(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D"


def test_the_gradient_is_that_of_the_weight_in_steps_of_the_grid(bert: nn.Module, ids: Tensor) -> None:
    student = coded(bert, {"input_ids": ids})
    latents = latents_of(student)
    site = "encoder.layer.1.output.dense"

    def loss() -> Tensor:
        return (student(ids).last_hidden_state * torch.linspace(-1, 1, 16)).double().square().sum()

    loss().backward()
    gradient = latents[site].gradient()
    assert gradient is not None
    row, column = divmod(int(gradient.abs().argmax()), gradient.shape[1])
    grid = float(latents[site].rows[row] * latents[site].columns[column])
    with torch.no_grad():
        weight, change = student.get_parameter(f"{site}.weight"), 1e-2
        weight[row, column] += change
        above = loss()
        weight[row, column] -= 2 * change
        below = loss()
    assert float(gradient[row, column]) == pytest.approx(float(above - below) / (2 * change) * grid, rel=0.02)


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "bart", "t5"])
def test_tied_weights_have_one_latent(family: str, build: Callable[..., nn.Module], ids: Tensor) -> None:
    student = coded(build(family, HEADS[family]), inputs(family, ids))
    latents = latents_of(student)
    weights = [id(latent.weight) for latent in latents]
    products = sum(isinstance(one, Product) for one in latents.whole().values())
    assert len(weights) == len(set(weights)) + products
    table, head = student.get_input_embeddings().weight, student.get_output_embeddings().weight
    assert table is head
    assert sum(one == id(table) for one in weights) == 1
    latent = next(one for one in latents if one.weight is table)
    latent.value.data += 1
    latents.write()
    assert student.get_output_embeddings().weight is table
    assert torch.equal(table, latent.whole().weight())


def test_a_frozen_weight_keeps_its_codes(bert: nn.Module, ids: Tensor) -> None:
    student = coded(bert, {"input_ids": ids})
    site = "encoder.layer.0.output.dense"
    student.get_parameter(f"{site}.weight").requires_grad_(False)
    latents = latents_of(student)
    assert site not in latents
    assert (latents.whole()[site].values == codes_of(student)[site].codes().values).all()


def test_margins_say_from_which_threshold_codes_get_smaller(bert: nn.Module, ids: Tensor) -> None:
    latents = latents_of(coded(bert, {"input_ids": ids}))
    latent = latents["encoder.layer.0.output.dense"]
    latent.value.data = torch.tensor([[0.2, 0.6, -0.7, 1.55, -2.3, 2.0, 0.0]])
    margins = latent.margins().sort().values
    assert margins.tolist() == pytest.approx([0.05, 0.1, 0.2], abs=1e-5)
    nearest = latent.rounded()
    for count, margin in enumerate(margins, 1):
        smaller = latent.rounded(Rule(0.5 + float(margin)))
        assert int((smaller != nearest).sum()) == count
        assert (smaller.abs() <= nearest.abs()).all()


@pytest.fixture
def thin(bert: nn.Module, ids: Tensor) -> nn.Module:
    """A coded BERT with a feed-forward matrix of rank 1, which is stored as a product."""
    weight = bert.encoder.layer[1].intermediate.dense.weight
    with torch.no_grad():
        weight.copy_(weight[:, :1] @ weight[:1])
    return coded(bert, {"input_ids": ids})


def test_a_product_has_latents_for_both_factors_with_the_gradient_of_each(thin: nn.Module, ids: Tensor) -> None:
    latents = latents_of(thin.double())  # a step of so fine a grid is lost in the rounding of float32
    site = "encoder.layer.1.intermediate.dense"
    assert site not in latents
    assert isinstance(latents.whole()[site], Product)

    def loss() -> Tensor:
        return (thin(ids).last_hidden_state * torch.linspace(-1, 1, 16).double()).square().sum()

    loss().backward()
    for part in (f"{site}.u", f"{site}.v"):
        latent = latents[part]
        gradient = latent.gradient()
        assert gradient is not None
        assert gradient.shape == latent.value.shape
        row, column = divmod(int(gradient.abs().argmax()), gradient.shape[1])
        losses = []
        for change in (1, -1):  # a whole step of the grid, since only whole codes are written
            latent.value.data[row, column] += change
            latents.write()
            losses.append(loss().item())
            latent.value.data[row, column] -= change
        latents.write()
        assert float(gradient[row, column]) == pytest.approx((losses[0] - losses[1]) / 2, rel=0.2)
    before = thin.get_parameter(f"{site}.weight").clone()
    latents[f"{site}.v"].value.data += 1
    latents.write()
    weight = thin.get_parameter(f"{site}.weight")
    assert torch.equal(weight, latents.whole()[site].weight())
    assert not torch.equal(weight, before)
